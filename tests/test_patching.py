"""Patching against forward hooks on the untouched Hugging Face model."""

import pandas as pd
import pytest
import torch
from transformer_lens import patching

from utils.heads import all_heads, cache_heads
from utils.metrics import logit_diff
from utils.patching import SITES, patch_head_hooks, patch_heads, patch_residual, patch_sublayer
from utils.prompts import induction_prompts, repeated_tokens

CLOSE = {"atol": 5e-3, "rtol": 1e-3}
pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def task(model_pair):
    """Two prompts, their key corruption (two positions differ) and the metric."""
    prompts = induction_prompts(model_pair[0], n_prompts=2, seq_len=7)
    return prompts, lambda logits: logit_diff(logits, prompts.answers)


def site_module(hf, layer, site):
    """The module and the part of its output (input for z) that holds a site of every head."""
    if hasattr(hf, "transformer"):
        attn, d_model = hf.transformer.h[layer].attn, hf.config.n_embd
        start = {"q": 0, "k": d_model, "v": 2 * d_model, "z": 0}[site]
        return attn.c_proj if site == "z" else attn.c_attn, slice(start, start + d_model)
    attn = hf.model.layers[layer].self_attn
    return getattr(attn, "o_proj" if site == "z" else f"{site}_proj"), slice(None)


def with_hook(module, site, hook, run):
    """Run with `hook(activation)` on the module's output, or on its input for z."""
    if site == "z":
        handle = module.register_forward_pre_hook(lambda _, args: (hook(args[0]),))
    else:
        handle = module.register_forward_hook(lambda _, args, out: hook(out))
    try:
        return run()
    finally:
        handle.remove()


def hf_patched(hf, clean, corrupted, metric, layer, head, site):
    """The metric with one head's activation taken from the clean run, by Hugging Face hooks."""
    module, part = site_module(hf, layer, site)
    d_head = hf.config.hidden_size // hf.config.num_attention_heads
    kept = {}

    def keep(x):
        kept["clean"] = x.clone()
        return x

    def patch(x):
        columns = slice((part.start or 0) + head * d_head, (part.start or 0) + (head + 1) * d_head)
        x = x.clone()
        x[..., columns] = kept["clean"][..., columns]
        return x

    with_hook(module, site, keep, lambda: hf(clean))
    return metric(with_hook(module, site, patch, lambda: hf(corrupted).logits))


@pytest.mark.parametrize("site", ["z", "q", "k", "v"])
def test_patching_heads_equals_hugging_face_hooks(model_pair, task, site):
    (model, hf), (prompts, metric) = model_pair, task
    clean, corrupted = prompts.clean, prompts.corrupted["key"]
    heads = [(0, 0), (1, 2)]
    got = patch_heads(model, clean, corrupted, metric, site, heads)
    want = [hf_patched(hf, clean, corrupted, metric, la, h, site) for la, h in heads]
    torch.testing.assert_close(got, torch.stack(want, dim=1), **CLOSE)
    assert (got - metric(hf(corrupted).logits)[:, None]).abs().max() > 0.01


def test_patching_patterns_equals_attending_by_hand(random_gpt2):
    prompts = induction_prompts(random_gpt2, 2, 7)
    clean, corrupted = prompts.clean, prompts.corrupted["key"]
    pattern = random_gpt2.run_with_cache(clean)[1]["pattern", 1]
    v = random_gpt2.run_with_cache(corrupted)[1]["v", 1]

    def attend(z, hook):
        z[:, :, 2] = torch.einsum("pds,pse->pde", pattern[:, 2], v[:, :, 2])
        return z

    logits = random_gpt2.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.attn.hook_z", attend)])
    got = patch_heads(
        random_gpt2, clean, corrupted, lambda x: x[:, -1, 7], "pattern", heads=[(1, 2)]
    )
    torch.testing.assert_close(got[:, 0], logits[:, -1, 7], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_all_heads_have_a_place_each(random_gpt2, site):
    prompts = induction_prompts(random_gpt2, 2, 7)
    pair = (prompts.clean, prompts.corrupted["key"])
    every = patch_heads(random_gpt2, *pair, lambda x: x[:, -1, 7], site)
    assert every.shape == (2, 3, 4)
    some = patch_heads(random_gpt2, *pair, lambda x: x[:, -1, 7], site, [(2, 3), (0, 1)])
    torch.testing.assert_close(torch.stack([every[:, 2, 3], every[:, 0, 1]], dim=1), some)


def test_grouped_keys_and_values_are_patched_by_key_value_head(smollm2):
    tokens = repeated_tokens(smollm2, 1, 4)
    got = patch_heads(smollm2, tokens, tokens, lambda x: x[:, -1, 7], "k", [(29, 2)])
    assert got.shape == (1, 1)
    with pytest.raises(ValueError, match="no head L29H3 at site 'k': 30 layers of 3"):
        patch_heads(smollm2, tokens, tokens, lambda x: x[:, -1, 7], "k", [(29, 3)])


def hf_residual_patched(hf, clean, corrupted, metric, layer, pos):
    blocks = hf.transformer.h if hasattr(hf, "transformer") else hf.model.layers
    kept = {}

    def keep(module, args):
        kept["clean"] = args[0].clone()

    def patch(module, args):
        hidden = args[0].clone()
        hidden[:, pos] = kept["clean"][:, pos]
        return (hidden, *args[1:])

    for hook, tokens in ((keep, clean), (patch, corrupted)):
        handle = blocks[layer].register_forward_pre_hook(hook)
        try:
            logits = hf(tokens).logits
        finally:
            handle.remove()
    return metric(logits)


def test_patching_the_residual_stream_equals_hugging_face_hooks(model_pair, task):
    (model, hf), (prompts, metric) = model_pair, task
    clean, corrupted = prompts.clean, prompts.corrupted["key"]
    layers, positions = [1, 2], [prompts.positions[p] for p in ("B", "END")]
    got = patch_residual(model, clean, corrupted, metric, positions, layers)
    want = [
        torch.stack(
            [hf_residual_patched(hf, clean, corrupted, metric, la, pos) for pos in positions], dim=1
        )
        for la in layers
    ]
    torch.testing.assert_close(got, torch.stack(want, dim=1), **CLOSE)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("name", ["random_gpt2", "smollm2"])
def test_patching_sublayers_equals_transformer_lens(request, name, site):
    model = request.getfixturevalue(name)
    prompts = induction_prompts(model, 2, 7)
    corrupted, end = prompts.corrupted["key"], prompts.positions["END"]
    layers, positions = [0, 2], [prompts.positions["A"] - 1, prompts.positions["B"], end]
    cache = model.run_with_cache(prompts.clean)[1]
    sweep = getattr(patching, f"get_act_patch_{site}")
    got = patch_sublayer(
        model, prompts.clean, corrupted, lambda x: x[:, -1, 7], site, positions, layers
    )
    frame = pd.DataFrame(
        [(la, pos) for la in layers for pos in positions], columns=["layer", "pos"]
    )
    want = sweep(
        model,
        corrupted,
        cache,
        lambda x: x[:, -1, 7].mean(),
        index_axis_names=None,
        index_df=frame,
    )
    torch.testing.assert_close(got.mean(0).flatten(), want, atol=1e-4, rtol=1e-4)
    unpatched = model(corrupted)[:, -1, 7]
    torch.testing.assert_close(got[:, :, 0], unpatched[:, None].expand(-1, 2), **CLOSE)
    assert (got[:, :, 1] - unpatched[:, None]).abs().max() > 1e-3


def test_patching_everything_is_clean_and_nothing_is_corrupted(model_pair, task):
    (model, hf), (prompts, metric) = model_pair, task
    corrupted, end = prompts.corrupted["query"], prompts.positions["END"]
    # the query corruption changes END alone: before layer 0 that is all there is to patch
    got = patch_residual(model, prompts.clean, corrupted, metric, [0, end - 1, end], [0])[:, 0]
    clean, unpatched = metric(hf(prompts.clean).logits), metric(hf(corrupted).logits)
    torch.testing.assert_close(got, torch.stack([unpatched, unpatched, clean], dim=1), **CLOSE)


def test_patching_the_residual_stream_of_a_native_toy(toy2):
    clean, corrupted = (repeated_tokens(toy2, 2, 3, seed=seed) for seed in (0, 1))
    cache = toy2.run_with_cache(clean)[1]

    def patch(resid, hook):
        resid[:, 4] = cache["resid_pre", 1][:, 4]
        return resid

    want = toy2.run_with_hooks(corrupted, fwd_hooks=[("blocks.1.hook_resid_pre", patch)])
    got = patch_residual(toy2, clean, corrupted, lambda x: x[:, -1, 7], [4], [1])
    torch.testing.assert_close(got[:, 0, 0], want[:, -1, 7], atol=1e-4, rtol=1e-4)


def test_default_is_every_layer_and_position(random_gpt2):
    clean, corrupted = (repeated_tokens(random_gpt2, 2, 3, seed=seed) for seed in (0, 1))
    every = patch_residual(random_gpt2, clean, corrupted, lambda x: x[:, -1, 7])
    assert every.shape == (2, 3, 7)
    some = patch_residual(random_gpt2, clean, corrupted, lambda x: x[:, -1, 7], [5], [2])
    torch.testing.assert_close(every[:, 2:3, 5:6], some)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("name", ["random_gpt2", "toy2"])
def test_joint_hooks_equal_single_patches_for_one_head(request, name, site):
    model = request.getfixturevalue(name)
    prompts = induction_prompts(model, 2, 7)
    clean, corrupted = prompts.clean, prompts.corrupted["key"]
    hooks = patch_head_hooks(model, cache_heads(model, clean, [site]), [(1, 2)], site)
    got = model.run_with_hooks(corrupted, fwd_hooks=hooks)[:, -1, 7]
    want = patch_heads(model, clean, corrupted, lambda x: x[:, -1, 7], site, [(1, 2)])
    torch.testing.assert_close(got, want[:, 0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_patching_equals_transformer_lens(random_gpt2, site):
    sweeps = {
        "z": patching.get_act_patch_attn_head_out_all_pos,
        "pattern": patching.get_act_patch_attn_head_pattern_all_pos,
    } | {s: getattr(patching, f"get_act_patch_attn_head_{s}_all_pos") for s in "qkv"}
    prompts = induction_prompts(random_gpt2, 2, 7)
    clean, corrupted = prompts.clean, prompts.corrupted["value"]
    cache = random_gpt2.run_with_cache(clean)[1]

    def metric(logits):
        return logit_diff(logits, prompts.answers)

    want = sweeps[site](random_gpt2, corrupted, cache, lambda logits: metric(logits).mean())
    got = patch_heads(random_gpt2, clean, corrupted, metric, site).mean(0)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", SITES)
def test_joint_hooks_put_every_named_head_in_place(smollm2, site):
    clean, corrupted = (repeated_tokens(smollm2, 2, 3, seed=seed) for seed in (0, 1))
    cache = cache_heads(smollm2, clean, [site])
    plain = cache_heads(smollm2, corrupted, [site])
    with smollm2.hooks(fwd_hooks=patch_head_hooks(smollm2, cache, [(4, 0), (4, 2)], site)):
        patched = cache_heads(smollm2, corrupted, [site])[site, 4]
    dim = 1 if site == "pattern" else 2
    for head, source in [(0, cache), (1, plain), (2, cache)]:
        torch.testing.assert_close(patched.select(dim, head), source[site, 4].select(dim, head))


def test_all_outputs_of_a_layer_at_once_equal_its_attention_output(random_gpt2):
    clean, corrupted = (repeated_tokens(random_gpt2, 2, 3, seed=seed) for seed in (0, 1))
    layer_1 = [head for head in all_heads(random_gpt2) if head.layer == 1]
    hooks = patch_head_hooks(random_gpt2, cache_heads(random_gpt2, clean, ["z"]), layer_1)
    attn_out = random_gpt2.run_with_cache(clean)[1]["attn_out", 1]
    whole = [("blocks.1.hook_attn_out", lambda out, hook: attn_out)]
    torch.testing.assert_close(
        random_gpt2.run_with_hooks(corrupted, fwd_hooks=hooks),
        random_gpt2.run_with_hooks(corrupted, fwd_hooks=whole),
        atol=1e-3,
        rtol=1e-3,
    )


def test_patching_leaves_no_hook(random_gpt2):
    tokens = repeated_tokens(random_gpt2, 1, 3)
    patch_heads(random_gpt2, tokens, tokens, lambda x: x[:, -1, 7], "z", [(0, 0)])
    patch_residual(random_gpt2, tokens, tokens, lambda x: x[:, -1, 7], [0], [0])
    assert not any(point.fwd_hooks for point in random_gpt2.hook_dict.values())


TOKENS = torch.ones(1, 4).long()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, f: patch_heads(m, TOKENS, TOKENS[:, 1:], f), "must have one shape"),
        (lambda m, f: patch_heads(m, TOKENS[:, :0], TOKENS, f), "clean is empty"),
        (lambda m, f: patch_heads(m, TOKENS, TOKENS, f, "w"), "site must be one of .* got 'w'"),
        (lambda m, f: patch_heads(m, TOKENS, TOKENS, f, "z", []), "heads is empty"),
        (lambda m, f: patch_heads(m, TOKENS, TOKENS, f, "z", [(3, 0)]), "no head L3H0"),
        (lambda m, f: patch_residual(m, TOKENS, TOKENS, f, [4]), "positions must be one or more"),
        (lambda m, f: patch_residual(m, TOKENS, TOKENS, f, [0], []), "layers must be one or more"),
        (lambda m, f: patch_residual(m, TOKENS, TOKENS, f, [0], [-1]), "layers must be"),
        (lambda m, f: patch_sublayer(m, TOKENS, TOKENS, f, "resid"), "site must be one of"),
        (lambda m, f: patch_head_hooks(m, {}, [(0, 0)], "z"), "cache lacks blocks.0.attn.hook_z"),
        (lambda m, f: patch_head_hooks(m, {}, [(0, 0)], "x"), "site must be one of"),
        (
            lambda m, f: patch_heads(m, TOKENS, TOKENS, lambda x: x.mean(), "z", [(0, 0)]),
            r"metric must give \[prompt\]",
        ),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2, lambda logits: logits[:, -1, 0])
