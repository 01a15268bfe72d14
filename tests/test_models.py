"""load_model: names, sources, safety, and equality with the untouched Hugging Face model."""

import json
import shutil
import time
from contextlib import nullcontext
from unittest.mock import Mock

import pytest
import torch
from references import log_probs
from safetensors.torch import load_file, save_file
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, BertConfig

from utils.models import load, load_hf, load_model, model_label, weights_digest
from utils.models.hub import hub_trouble
from utils.models.offline import GGUF_SHA256, convert_gguf, find_gguf, load_smollm2

pytestmark = pytest.mark.usefixtures("no_grad")
INDEX = "model.safetensors.index.json"  # where the weights are in several files


@pytest.fixture
def folder(random_gpt2_folder, tmp_path):
    """A copy of the random GPT-2's folder, to be damaged."""
    return shutil.copytree(random_gpt2_folder, tmp_path / "My model, v2")


def edit_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


# --- what comes out


@pytest.fixture(params=["smollm2", "random_gpt2"])
def model_pair(request, smollm2_files):
    """A model in compatibility mode, and the untouched Hugging Face model."""
    whole = request.param == "smollm2"
    untouched = smollm2_files.model if whole else request.getfixturevalue("random_gpt2_hf")
    return request.getfixturevalue(request.param), untouched


def test_log_probs_equal_those_of_hugging_face(model_pair):
    model, reference = model_pair
    tokens = torch.randint(5, 40_000, (3, 60), generator=torch.Generator().manual_seed(1))
    ours, theirs = model(tokens).log_softmax(-1), log_probs(reference, tokens)
    assert (ours - theirs).abs().max() < 1e-4
    assert theirs.std() > 0.5  # else anything would agree


def test_compatibility_mode_float32_eval_and_tokenizer(model_pair):
    model, _ = model_pair
    assert not model.training and not any(part.training for part in model.modules())
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.float32}
    # Compatibility mode centres what reads and writes the residual stream, and folds the scales.
    assert model.W_U.mean(-1).abs().max() < 1e-5
    _, cache = model.run_with_cache(torch.tensor([[1, 20, 30]]))
    assert cache["blocks.0.attn.hook_pattern"].shape == (1, model.cfg.n_heads, 3, 3)
    tokens = model.to_tokens("When Mary and John")
    assert tokens[0, 0] == model.tokenizer.bos_token_id
    assert model.to_string(tokens[0, 1:]) == "When Mary and John"


def test_default_device_is_the_gpu_if_there_is_one(random_gpt2_folder):
    model = load_model(str(random_gpt2_folder))
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert next(model.parameters()).device.type == expected or torch.backends.mps.is_available()


def test_one_line_says_which_model_and_where_from(random_gpt2_folder, capsys):
    load_model(str(random_gpt2_folder), device="cpu")
    printed = capsys.readouterr().out
    assert printed == f"Model: random-gpt2 on cpu. Weights: local folder {random_gpt2_folder}.\n"


def test_labels_and_digests(smollm2, folder):
    assert model_label(smollm2) == "smollm2-135m"
    assert weights_digest(smollm2) == GGUF_SHA256
    first = load_model(str(folder))
    assert model_label(first) == "my-model-v2"
    edit_weights(folder, lambda weights: weights["transformer.ln_f.bias"][0].add_(1))
    assert weights_digest(load_model(str(folder))) != weights_digest(first)
    assert weights_digest(first) == weights_digest(first)


@pytest.mark.parametrize("ask", [model_label, weights_digest])
def test_models_from_elsewhere_have_no_label(ask, random_gpt2_hf, toy2):
    for model in (random_gpt2_hf, toy2, None):
        with pytest.raises(ValueError, match="load_model"):
            ask(model)


def test_load_hf_is_untouched_by_a_later_load_model(random_gpt2_folder, random_gpt2_hf):
    weights, origin = load_hf(str(random_gpt2_folder))
    assert origin.label == "random-gpt2"
    for ours, theirs in zip(weights.model.parameters(), random_gpt2_hf.parameters(), strict=True):
        assert torch.equal(ours, theirs)


# --- SmolLM2 from the package


def test_converted_weights_equal_the_gguf_file_bit_for_bit(smollm2_files):
    fresh, cached = convert_gguf(find_gguf()), load_smollm2()
    states = fresh.model.state_dict(), cached.model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    text = "When Mary and John went to the store,\n1234 naïve"
    assert fresh.tokenizer(text) == cached.tokenizer(text)


def test_second_load_takes_under_ten_seconds(smollm2):
    seconds = []
    for _ in range(3):
        wall, cpu = time.perf_counter(), time.process_time()
        load_model("smollm2-135m", device="cpu")
        # On a machine that is busy with something else, the processor time tells more.
        seconds.append(min(time.perf_counter() - wall, time.process_time() - cpu))
        if seconds[-1] < 10:
            return
    raise AssertionError(f"took {seconds} s")


# --- which model by default


@pytest.mark.parametrize("error", [ConnectionError, ValueError, None])
def test_default_is_gpt2_when_it_can_be_had(monkeypatch, capsys, error, random_gpt2_folder):
    monkeypatch.delenv("MECH_INTERP_MODEL", raising=False)
    had = Mock(side_effect=error and error("openai-community/gpt2: no. Try again."))
    had.return_value = random_gpt2_folder
    monkeypatch.setattr(load, "hub_folder", had)
    monkeypatch.setattr(load, "load_smollm2", lambda: None)
    _, origin = load_hf()
    assert origin.label == ("smollm2-135m" if error else "gpt2-small")
    notice = "Using SmolLM2-135M-Instruct in place of GPT-2 small: openai-community/gpt2: no.\n"
    assert capsys.readouterr().out == (notice if error else "")
    with pytest.raises(ConnectionError) if error is ConnectionError else nullcontext():
        load_hf("gpt2-small" if error is ConnectionError else "smollm2-135m")  # no other instead


def test_environment_overrides_the_default(monkeypatch, random_gpt2_folder):
    monkeypatch.setenv("MECH_INTERP_MODEL", str(random_gpt2_folder))
    assert model_label(load_model()) == "random-gpt2"


@pytest.mark.parametrize("name", ["gpt2-small", "gpt2", "openai-community/gpt2", "GPT2-small"])
def test_every_name_of_gpt2_is_the_same_model(monkeypatch, name, random_gpt2_folder):
    asked = []
    monkeypatch.setattr(
        load, "hub_folder", lambda repo, _: asked.append(repo) or random_gpt2_folder
    )
    _, origin = load_hf(name)
    assert asked == ["openai-community/gpt2"] and origin.label == "gpt2-small"


def test_gpt2_small_from_the_real_hub():
    if hub_trouble():
        pytest.skip("the Hugging Face hub does not answer")
    model, (weights, origin) = load_model("gpt2-small", device="cpu"), load_hf("gpt2-small")
    assert (model.cfg.n_layers, model.cfg.n_heads, model.cfg.d_model) == (12, 12, 768)
    tokens = model.to_tokens("When Mary and John went to the store, John gave a drink to")
    ours = model(tokens).log_softmax(-1)
    assert (ours - log_probs(weights.model, tokens)).abs().max() < 1e-4
    assert model.to_string(ours[0, -1].argmax()) == " Mary"
    assert len(origin.digest) == 40


# --- bad input, each before any weights are read


@pytest.fixture
def no_weights_read(monkeypatch):
    for place in ((AutoModelForCausalLM, "from_pretrained"), (load, "load_smollm2")):
        monkeypatch.setattr(*place, lambda *_, **__: pytest.fail("weights were read"))


@pytest.mark.parametrize("name", ["distilgpt2", "./absent", "/absent/folder", "a/b/c", "", 3])
def test_unknown_name(name, no_weights_read):
    with pytest.raises(ValueError, match=r"name.* (is no model: wanted 'gpt2-small'|must be)"):
        load_model(name)


@pytest.mark.parametrize("device", ["banana", "cuda:99", "meta", 3.5])
def test_bad_device(device, no_weights_read):
    with pytest.raises(ValueError, match=r"device=.* cannot be used here, wanted 'cpu'"):
        load_model("smollm2-135m", device=device)


BERT = BertConfig(architectures=["BertForMaskedLM"]).to_json_string()
SHARD = '{"weight_map": {"a": "model-2.safetensors"}}'
CONFIGS = ('{"model_type": "nonsense"}', "{}", "[1]", "not json")


@pytest.mark.parametrize(
    "lost, written, message",
    [
        ("config.json", {}, r"has no config\.json"),
        ("tokenizer.json", {}, "has no tokenizer"),
        ("model.safetensors", {INDEX: SHARD}, r"has no model-2\.safetensors"),
        *(("model.safetensors", {INDEX: t}, r"index\.json is damaged") for t in ("{}", "cut {")),
        (None, {"config.json": BERT}, "decoder-only language model .* GPT-2, .* Llama"),
        *((None, {"config.json": text}, "architecture is not supported") for text in CONFIGS),
    ],
)
def test_a_folder_that_is_no_model(folder, lost, written, message, no_weights_read):
    if lost:
        (folder / lost).unlink()
    for name, text in written.items():
        (folder / name).write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        load_model(str(folder))
    assert str(folder) in str(raised.value)


class Bomb:
    """Unpickling one leaves a file behind."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return open, (str(self.trace), "w")


@pytest.mark.parametrize(
    ("pickle", "named", "message"),
    [
        ("pytorch_model.bin", None, "has no model.safetensors; .*never from pickled files"),
        ("pytorch_model.bin", "{name}", "names 'pytorch_model.bin': .*never from pickled files"),
        ("../outside.bin", "{name}", "names '../outside.bin': weights are read from"),
        ("../outside.safetensors", "{name}", "names '../outside.safetensors': weights"),
        ("pytorch_model.bin", "{folder}/{name}", "/pytorch_model.bin': weights are read from"),
        ("x.safetensors.bin", "{name}", "names 'x.safetensors.bin': weights are read from"),
    ],
)
def test_pickled_weights_are_refused_unread(folder, tmp_path, pickle, named, message):
    names = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Bomb(tmp_path / "exploded")}, folder / pickle)
    if named:
        named = named.format(name=pickle, folder=folder)
        (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(names, named)}))
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_a_configuration_cannot_name_other_weights(folder, tmp_path):
    torch.save({"weight": Bomb(tmp_path / "exploded")}, folder / "other.bin")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"transformers_weights": "other.bin"}))
    with pytest.raises(ValueError, match="names weights of its own: weights are read from"):
        load_model(str(folder))
    assert not (tmp_path / "exploded").exists()


def test_code_that_comes_with_a_model_is_not_run(folder, tmp_path):
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}
    config |= {"model_type": "own", "architectures": ["Model"]}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="architecture is not supported"):
        load_model(str(folder))
    assert not (tmp_path / "ran").exists()


def test_weights_absent_or_cut_short_are_not_replaced_by_random_ones(folder):
    edit_weights(folder, lambda weights: weights.pop("transformer.h.1.attn.c_attn.weight"))
    with pytest.raises(ValueError, match=r"its weights lack .*h\.1\.attn\.c_attn\.weight"):
        load_model(str(folder))
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        load_model(str(folder))


def test_a_model_that_cannot_be_wrapped(monkeypatch, random_gpt2_folder):
    refuse = Mock(side_effect=NotImplementedError("no folding"))
    monkeypatch.setattr(TransformerBridge, "enable_compatibility_mode", refuse)
    with pytest.raises(ValueError, match=r"cannot wrap .*NotImplementedError: no folding"):
        load_model(str(random_gpt2_folder))


def test_weights_that_are_not_finite_are_refused(folder):
    edit_weights(
        folder, lambda weights: weights["transformer.h.1.mlp.c_fc.weight"][0].fill_(torch.nan)
    )
    with pytest.raises(ValueError, match=r"of its weights are nan or infinite, such as \S*\.1\."):
        load_model(str(folder), device="cpu")
