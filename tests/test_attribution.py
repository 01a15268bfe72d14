"""Attribution against hooks on the untouched Hugging Face model, and against TransformerLens."""

import pytest
import torch
from transformer_lens.tools import analysis
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

from utils.attribution import (
    HEAD_SITES,
    RESIDUAL_SITES,
    Attribution,
    attention_to,
    attribution_patching,
    direct_logit_attribution,
    head_attribution,
    head_projections,
    logit_lens,
)
from utils.metrics import logit_diff
from utils.models import load_hf, load_model
from utils.prompts import induction_prompts
from utils.toy import build_toy

CLOSE = {"atol": 1e-3, "rtol": 1e-3}
SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Parallel attention and MLP, grouped keys and values, attention only; all weights random."""
    tokenizer = load_hf("smollm2-135m")[0].tokenizer
    generator = torch.Generator().manual_seed(0)
    models = {"toy": build_toy(2)}
    models["toy"].enable_compatibility_mode()
    for name, hf in {
        "parallel": GPTNeoXForCausalLM(GPTNeoXConfig(vocab_size=len(tokenizer), **SIZES)),
        "grouped": LlamaForCausalLM(
            LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **SIZES)
        ),
    }.items():
        for parameter in hf.parameters():
            with torch.no_grad():
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        folder = tmp_path_factory.mktemp("random") / name
        hf.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        models[name] = load_model(str(folder), device="cpu")
    return models


@pytest.fixture(params=["parallel", "grouped", "toy"])
def other(request, others):
    return others[request.param]


@pytest.fixture
def task(model_pair):
    """Three prompts whose next token is a copy, and the two answers."""
    prompts = induction_prompts(model_pair[0], n_prompts=3, seq_len=7)
    return prompts.clean, prompts.answers


def hf_parts(hf):
    """Blocks, attention modules, their output projections, MLPs, last norm."""
    if hasattr(hf, "transformer"):
        blocks = hf.transformer.h
        attns = [block.attn for block in blocks]
        return blocks, attns, [attn.c_proj for attn in attns], hf.transformer.ln_f
    blocks = hf.model.layers
    attns = [block.self_attn for block in blocks]
    return blocks, attns, [attn.o_proj for attn in attns], hf.model.norm


def hf_run(hf, tokens):
    """A run of the untouched model: what every module of interest got and gave, at the end."""
    blocks, attns, projections, norm = hf_parts(hf)
    got, given, handles = {}, {}, []

    def keep(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        given[module] = out[:, -1] if out.shape[0] == len(tokens) else out[:, -1].expand(3, -1)
        if args and args[0].ndim == 3:
            got[module] = args[0][:, -1]

    embeddings = [hf.get_input_embeddings()]
    if hasattr(hf, "transformer"):
        embeddings.append(hf.transformer.wpe)
    mlps = [block.mlp for block in blocks]
    for module in [*embeddings, *attns, *projections, *mlps, *blocks, norm]:
        handles.append(module.register_forward_hook(keep))
    try:
        logits = hf(tokens).logits
    finally:
        for handle in handles:
            handle.remove()
    return got, given, embeddings, logits


def hf_reader(hf, answers, last):
    """Logit difference of a part of the last residual stream, by the norm's own formula."""
    norm = hf_parts(hf)[-1]
    directions = hf.lm_head.weight[answers[:, 0]] - hf.lm_head.weight[answers[:, 1]]
    centres = hasattr(hf, "transformer")
    eps = norm.eps if centres else norm.variance_epsilon
    spread = last.var(-1, unbiased=False) if centres else last.pow(2).mean(-1)

    def read(part):
        part = part - part.mean(-1, keepdim=True) if centres else part
        return (part / (spread[:, None] + eps).sqrt() * norm.weight * directions).sum(-1)

    bias = (norm.bias * directions).sum(-1) if centres else torch.zeros(len(answers))
    return read, bias


def test_components_equal_hugging_face_hooks(model_pair, task):
    (model, hf), (tokens, answers) = model_pair, task
    got, given, embeddings, logits = hf_run(hf, tokens)
    blocks, attns, _, norm = hf_parts(hf)
    read, bias = hf_reader(hf, answers, got[norm])
    modules = [*embeddings]
    for block, attn in zip(blocks, attns, strict=True):
        modules += [attn, block.mlp]
    want = torch.stack([read(given[module]) for module in modules] + [bias], dim=1)
    result = direct_logit_attribution(model, tokens, answers)
    torch.testing.assert_close(result.values, want, **CLOSE)
    torch.testing.assert_close(result.values.sum(1), logit_diff(logits, answers), **CLOSE)
    sublayers = [f"{la}_{out}" for la in range(len(blocks)) for out in ("attn_out", "mlp_out")]
    assert result.labels == ["embed", "pos_embed"][: len(embeddings)] + sublayers + ["b_U"]


def hf_head_outputs(hf, tokens, answers, layer):
    """What each head of a layer writes, value biases left out (they belong to b_O)."""
    got = hf_run(hf, tokens)[0]
    blocks, attns, projections, norm = hf_parts(hf)
    read = hf_reader(hf, answers, got[norm])[0]
    z, weight = got[projections[layer]], projections[layer].weight
    if hasattr(hf, "transformer"):
        values = attns[layer].c_attn
        from_v = slice(2 * z.shape[1], None)
        shift = blocks[layer].ln_1.bias @ values.weight[:, from_v] + values.bias[from_v]
        z, weight = z - shift, weight.T
    n_heads = hf.config.num_attention_heads
    columns = torch.arange(z.shape[1]).chunk(n_heads)
    return torch.stack([read(z[:, c] @ weight[:, c].T) for c in columns], dim=1)


def test_heads_equal_hugging_face_hooks(model_pair, task):
    (model, hf), (tokens, answers) = model_pair, task
    result = head_attribution(model, tokens, answers)
    for layer in (0, 2):
        want = hf_head_outputs(hf, tokens, answers, layer)
        torch.testing.assert_close(result[:, layer], want, **CLOSE)


def test_heads_and_their_bias_are_the_attention_output(model_pair, task):
    model, (tokens, answers) = model_pair[0], task
    components = direct_logit_attribution(model, tokens, answers)
    scale = model.run_with_cache(tokens)[1]["ln_final.hook_scale"][:, -1]
    directions = (model.W_U[:, answers[:, 0]] - model.W_U[:, answers[:, 1]]).T
    heads = head_attribution(model, tokens, answers).sum(-1)
    for layer, block in enumerate(model.blocks):
        want = components.values[:, components.labels.index(f"{layer}_attn_out")]
        b_o = block.attn.b_O
        bias = 0 if b_o is None else ((b_o - b_o.mean()) / scale * directions).sum(-1)
        torch.testing.assert_close(heads[:, layer] + bias, want, **CLOSE)


def test_every_architecture_adds_up(other):
    prompts = induction_prompts(other, 3, 7)
    want = logit_diff(other(prompts.clean), prompts.answers)
    components = direct_logit_attribution(other, prompts.clean, prompts.answers)
    lens = logit_lens(other, prompts.clean, prompts.answers)
    torch.testing.assert_close(components.values.sum(1), want, **CLOSE)
    torch.testing.assert_close(lens.values[:, -1], want, **CLOSE)
    assert want.abs().max() > 1e-2


def test_components_and_heads_equal_transformer_lens(other):
    prompts = induction_prompts(other, 3, 7)
    tokens, (right, wrong) = prompts.clean, prompts.answers.T
    want = analysis.direct_logit_attribution(other, tokens, right, wrong)
    result = direct_logit_attribution(other, tokens, prompts.answers)
    torch.testing.assert_close(result.values[:, :-1].T, want.attribution)
    heads = analysis.direct_logit_attribution(other, tokens, right, wrong, unit="head")
    result = head_attribution(other, tokens, prompts.answers).flatten(1)
    torch.testing.assert_close(result.T, heads.attribution[:-1], **CLOSE)


def test_logit_lens_equals_hugging_face_hidden_states(model_pair, task):
    (model, hf), (tokens, answers) = model_pair, task
    got, given, _, _ = hf_run(hf, tokens)
    blocks, attns, _, norm = hf_parts(hf)
    read, bias = hf_reader(hf, answers, got[norm])
    result = logit_lens(model, tokens, answers)
    for layer in (1, len(blocks) - 1):
        before = given[blocks[layer - 1]]
        for label, resid in (
            (f"{layer}_pre", before),
            (f"{layer}_mid", before + given[attns[layer]]),
        ):
            column = result.values[:, result.labels.index(label)]
            torch.testing.assert_close(column, read(resid) + bias, **CLOSE)


def test_logit_lens_steps_are_the_components(model_pair, task):
    model, (tokens, answers) = model_pair[0], task
    steps = logit_lens(model, tokens, answers).values.diff(dim=1)
    components = direct_logit_attribution(model, tokens, answers)
    first = components.labels.index("0_attn_out")
    torch.testing.assert_close(steps, components.values[:, first:-1], **CLOSE)


def test_logit_lens_has_the_half_layers_a_model_has(others):
    labels = {}
    for name, model in others.items():
        prompts = induction_prompts(model, 1, 7)
        labels[name] = logit_lens(model, prompts.clean, prompts.answers).labels
    assert labels["parallel"] == ["0_pre", "1_pre", "2_pre", "final_post"]
    assert labels["toy"] == ["0_pre", "1_pre", "final_post"]
    halves = [f"{layer}_{at}" for layer in range(3) for at in ("pre", "mid")]
    assert labels["grouped"] == [*halves, "final_post"]


def test_projections_equal_a_loop(model_pair, task):
    model, (tokens, answers) = model_pair[0], task
    heads, targets = [(2, 1), (0, 3)], torch.cat([answers, tokens[:, 1:2]], dim=1)
    result = head_projections(model, tokens, heads, targets)
    assert result.shape == (3, 3, 2)
    cache = model.run_with_cache(tokens)[1]
    for prompt in range(3):
        for column, (layer, head) in enumerate(heads):
            written = cache["z", layer][prompt, -1, head] @ model.W_O[layer, head]
            scaled = written / cache["ln_final.hook_scale"][prompt, -1]
            want = scaled @ model.W_U[:, targets[prompt]]
            torch.testing.assert_close(result[prompt, :, column], want, **CLOSE)
    difference = head_attribution(model, tokens, answers)[:, [2, 0], [1, 3]]
    torch.testing.assert_close(result[:, 0] - result[:, 1], difference, **CLOSE)


def test_attention_equals_hugging_face(model_pair, task):
    (model, hf), (tokens, _) = model_pair, task
    sources = torch.tensor([[1, 4], [0, 9], [2, 2]])
    result = attention_to(model, tokens, [(2, 1), (0, 3)], sources)
    attentions = hf(tokens, output_attentions=True).attentions
    for column, (layer, head) in enumerate([(2, 1), (0, 3)]):
        for prompt in range(3):
            want = attentions[layer][prompt, head, -1, sources[prompt]]
            torch.testing.assert_close(result[prompt, :, column], want, **CLOSE)
    assert result.std() > 0.01


def test_small_batches_change_nothing(random_gpt2, monkeypatch):
    prompts = induction_prompts(random_gpt2, 3, 7)
    tokens, answers = prompts.clean, prompts.answers
    calls = {
        direct_logit_attribution: (answers,),
        logit_lens: (answers,),
        head_attribution: (answers,),
        head_projections: ([(1, 1)], answers),
        attention_to: ([(1, 1)], torch.tensor([[1], [2], [3]])),
    }
    whole = [function(random_gpt2, tokens, *rest) for function, rest in calls.items()]
    monkeypatch.setattr("utils.metrics.MAX_LOGITS", 2 * tokens.shape[1] * random_gpt2.cfg.d_vocab)
    for (function, rest), want in zip(calls.items(), whole, strict=True):
        got = function(random_gpt2, tokens, *rest)
        if isinstance(got, Attribution):
            got, want = got.values, want.values
        torch.testing.assert_close(got, want)


def pair_and_metric(model):
    """Two prompts that differ from the first copy on, and their logit difference."""
    prompts = induction_prompts(model, 2, 7)
    return (prompts.clean, prompts.corrupted["value"]), lambda x: logit_diff(x, prompts.answers)


def finite_difference(model, clean, corrupted, metric, name, where, step=0.003):
    """Slope of the metric on the way from the corrupted to the clean activation, by two runs."""
    wanted = model.run_with_cache(clean, names_filter=[name])[1][name]

    def moved(share):
        def move(activation, hook):
            activation = activation.clone()
            activation[where] += share * (wanted - activation)[where]
            return activation

        return metric(model.run_with_hooks(corrupted, fwd_hooks=[(name, move)]))

    return (moved(step) - moved(-step)) / (2 * step)


@pytest.mark.parametrize(
    ("name", "site"),
    [("random_gpt2", site) for site in HEAD_SITES + RESIDUAL_SITES]
    + [("smollm2", site) for site in ("z", "k", "resid_pre")],
)
def test_attribution_patching_equals_a_finite_difference(request, name, site):
    model = request.getfixturevalue(name)
    pair, metric = pair_and_metric(model)
    result = attribution_patching(model, *pair, metric, site)
    every = slice(None)
    for layer, place in ((1, 2), (model.cfg.n_layers - 1, -1)):
        if site in HEAD_SITES:
            point, where = f"blocks.{layer}.attn.hook_{site}", (every, every, place)
        else:
            point, where = f"blocks.{layer}.hook_{site}", (every, place)
        want = finite_difference(model, *pair, metric, point, where)
        torch.testing.assert_close(result[:, layer, place], want, atol=5e-3, rtol=2e-2)
    assert result.abs().max() > 0.02


@pytest.mark.parametrize("name", ["smollm2", "random_gpt2"])
def test_attribution_patching_equals_transformer_lens(request, name):
    model = request.getfixturevalue(name)
    prompts = induction_prompts(model, 1, 7)
    clean, corrupted, answers = prompts.clean, prompts.corrupted["value"], prompts.answers
    with torch.enable_grad():
        scores = analysis.attribution_patch(
            model, clean, corrupted, lambda logits: logit_diff(logits, answers).sum()
        ).node_scores
    z, mlp = (
        attribution_patching(model, clean, corrupted, lambda x: logit_diff(x, answers), site)[0]
        for site in ("z", "mlp_out")
    )
    want_z, want_mlp = torch.zeros_like(z), torch.zeros_like(mlp)
    for node, score in scores.items():
        if node.kind == "attn_head_out":
            want_z[node.layer, node.head] += score
        elif node.kind == "mlp_out":
            want_mlp[node.layer, node.position] += score
    torch.testing.assert_close(z, want_z, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(mlp, want_mlp, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("site", HEAD_SITES + RESIDUAL_SITES)
def test_attribution_patching_covers_the_model(others, site):
    for name, model in others.items():
        pair, metric = pair_and_metric(model)
        if name == "toy" and site == "mlp_out":
            with pytest.raises(ValueError, match="this model has no blocks"):
                attribution_patching(model, *pair, metric, site)
            continue
        result = attribution_patching(model, *pair, metric, site)
        columns = pair[0].shape[1]
        if site in HEAD_SITES:
            columns = 2 if name == "grouped" and site in ("k", "v") else 4
        assert result.shape == (2, model.cfg.n_layers, columns)
        prompt = attribution_patching(model, pair[0][1:], pair[1][1:], lambda x: x[:, -1, 7], site)
        both = attribution_patching(model, *pair, lambda x: x[:, -1, 7], site)
        torch.testing.assert_close(prompt[0], both[1], atol=1e-5, rtol=1e-4)
        assert result.abs().max() > 0


def test_a_patch_that_changes_nothing_has_no_effect(random_gpt2):
    (clean, corrupted), metric = pair_and_metric(random_gpt2)
    result = attribution_patching(random_gpt2, clean, corrupted, metric, "resid_pre")
    same = (clean == corrupted).all(0)
    assert (result[:, 0, same] == 0).all()
    assert (result[:, 0, ~same] != 0).all()


def test_the_model_is_left_as_it_was(random_gpt2):
    pair, metric = pair_and_metric(random_gpt2)
    frozen = next(random_gpt2.parameters()).requires_grad_(False)

    def fails(logits):
        raise RuntimeError("stop")

    try:
        before = [p.requires_grad for p in random_gpt2.parameters()]
        attribution_patching(random_gpt2, *pair, metric)
        assert [p.requires_grad for p in random_gpt2.parameters()] == before
        with pytest.raises(RuntimeError, match="stop"):
            attribution_patching(random_gpt2, *pair, fails)
        assert [p.requires_grad for p in random_gpt2.parameters()] == before
    finally:
        frozen.requires_grad_(True)
    assert all(p.grad is None for p in random_gpt2.parameters())
    assert not any(point.fwd_hooks for point in random_gpt2.hook_dict.values())
    assert not torch.is_grad_enabled()


TOKENS, ANSWERS = torch.ones(2, 4).long(), torch.tensor([[1, 2], [3, 4]])


def value(logits):
    return logits[:, -1, 0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: direct_logit_attribution(m, TOKENS, ANSWERS[:1]),
            r"answers must have shape \[2 2",
        ),
        (lambda m: logit_lens(m, TOKENS, ANSWERS[:, :1]), r"answers must have shape \[2 2\]"),
        (lambda m: head_attribution(m, TOKENS, ANSWERS.float()), "answers must be integers"),
        (lambda m: head_attribution(m, TOKENS, -ANSWERS), r"answers must lie in 0\.\."),
        (lambda m: logit_lens(m, TOKENS[:0], ANSWERS), "tokens is empty"),
        (lambda m: head_projections(m, TOKENS, [], ANSWERS), "heads is empty"),
        (
            lambda m: head_projections(m, TOKENS, [(0, 0)], ANSWERS[:, :0]),
            "targets must be integers",
        ),
        (lambda m: head_projections(m, TOKENS, [(3, 0)], ANSWERS), "no head L3H0"),
        (lambda m: attention_to(m, TOKENS, [(0, 0)], ANSWERS), r"positions must lie in 0\.\.3"),
        (lambda m: attention_to(m, TOKENS, [(0, 9)], ANSWERS), "no head L0H9"),
        (lambda m: attribution_patching(m, TOKENS, TOKENS, value, "w"), "site must be one of"),
        (lambda m: attribution_patching(m, TOKENS, TOKENS[:, 1:], value), "must have one shape"),
        (lambda m: attribution_patching(m, TOKENS, TOKENS[:0], value), "corrupted is empty"),
        (
            lambda m: attribution_patching(m, TOKENS, TOKENS, lambda x: x.mean()),
            r"metric must give differentiable \[prompt\] values, got shape \(\)",
        ),
        (
            lambda m: attribution_patching(m, TOKENS, TOKENS, lambda x: value(x).detach()),
            "metric must give differentiable",
        ),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)


def test_a_model_that_cannot_be_read_is_refused(toy2, random_gpt2, monkeypatch):
    with pytest.raises(ValueError, match="must be in compatibility mode"):
        head_attribution(toy2, TOKENS, ANSWERS)
    # where a norm stands between heads and residual stream, heads have no output of their own
    monkeypatch.setattr(random_gpt2.blocks[0], "ln1_post", torch.nn.Identity(), raising=False)
    with pytest.raises(ValueError, match="do not write to the residual stream one by one"):
        head_attribution(random_gpt2, TOKENS, ANSWERS)
