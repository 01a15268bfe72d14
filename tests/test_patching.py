"""Patching against forward hooks on the untouched Hugging Face model."""

from itertools import product

import pandas as pd
import pytest
import references
import torch
from transformer_lens import patching

from utils.heads import HEAD_SITES
from utils.metrics import logit_diff
from utils.patching import patch_heads, patch_stream
from utils.prompts import induction_prompts, repeated_tokens

CLOSE = {"atol": 5e-3, "rtol": 1e-3}
pytestmark = pytest.mark.usefixtures("no_grad")


def one_logit(logits):
    return logits[:, -1, 7]


@pytest.fixture
def task(model_pair):
    """Two prompts, their key corruption (two positions differ) and the metric."""
    prompts = induction_prompts(model_pair[0], n_prompts=2, seq_len=7)
    return prompts, lambda logits: logit_diff(logits, prompts.answers)


def hf_patched(hf, clean, corrupted, metric, layer, place, site):
    """The metric with one head, or one position, of a layer taken from the clean run."""
    values = references.recorded(hf, clean, site)[:, layer]

    def edit(la, x):
        if la == layer:
            where = (slice(None), slice(None), place) if site in "zqkv" else (slice(None), place)
            x[where] = values[where]
        return x

    return metric(references.run(hf, corrupted, edit, site))


@pytest.mark.parametrize("site", ["z", "q", "k", "v"])
def test_patching_heads_equals_hugging_face_hooks(model_pair, task, site):
    (model, hf), (prompts, metric) = model_pair, task
    clean, corrupted = prompts.clean, prompts.corrupted["key"]
    heads = [(0, 0), (1, 1)]
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
    got = patch_heads(random_gpt2, clean, corrupted, one_logit, "pattern", heads=[(1, 2)])
    torch.testing.assert_close(got[:, 0], logits[:, -1, 7], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("site", HEAD_SITES)
def test_all_heads_have_a_place_each(random_gpt2, site):
    prompts = induction_prompts(random_gpt2, 2, 7)
    pair = (prompts.clean, prompts.corrupted["key"])
    every = patch_heads(random_gpt2, *pair, one_logit, site)
    assert every.shape == (2, 3, 4)
    some = patch_heads(random_gpt2, *pair, one_logit, site, [(2, 3), (0, 1)])
    torch.testing.assert_close(torch.stack([every[:, 2, 3], every[:, 0, 1]], dim=1), some)


def test_grouped_keys_and_values_are_patched_by_key_value_head(random_smollm2):
    tokens = repeated_tokens(random_smollm2, 1, 4)
    assert patch_heads(random_smollm2, tokens, tokens, one_logit, "k", [(3, 1)]).shape == (1, 1)
    with pytest.raises(ValueError, match="no head L3H2 at 'k': 4 layers of 2"):
        patch_heads(random_smollm2, tokens, tokens, one_logit, "k", [(3, 2)])


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out"])
def test_patching_the_stream_equals_hugging_face_hooks(model_pair, task, site):
    (model, hf), (prompts, metric) = model_pair, task
    clean, corrupted = prompts.clean, prompts.corrupted["key"]
    layers, positions = [1, 2], [prompts.positions[p] for p in ("B", "END")]
    got = patch_stream(model, clean, corrupted, metric, site, positions, layers)
    cells = [(layer, pos) for layer in layers for pos in positions]
    want = [hf_patched(hf, clean, corrupted, metric, *cell, site) for cell in cells]
    torch.testing.assert_close(got.flatten(1), torch.stack(want, dim=1), **CLOSE)


@pytest.mark.parametrize("site", ["attn_out", "mlp_out"])
@pytest.mark.parametrize("name", ["random_gpt2", "random_smollm2"])
def test_patching_sublayers_equals_transformer_lens(request, name, site):
    model = request.getfixturevalue(name)
    prompts = induction_prompts(model, 2, 7)
    corrupted, end = prompts.corrupted["key"], prompts.positions["END"]
    layers, positions = [0, 2], [prompts.positions["A"] - 1, prompts.positions["B"], end]
    cache = model.run_with_cache(prompts.clean)[1]
    pair = (prompts.clean, corrupted)
    got = patch_stream(model, *pair, one_logit, site, positions, layers)
    cells = pd.DataFrame(product(layers, positions), columns=["layer", "pos"])
    want = getattr(patching, f"get_act_patch_{site}")(
        model,
        corrupted,
        cache,
        lambda x: one_logit(x).mean(),
        index_axis_names=None,
        index_df=cells,
    )
    torch.testing.assert_close(got.mean(0).flatten(), want, atol=1e-4, rtol=1e-4)
    unpatched = model(corrupted)[:, -1, 7]
    torch.testing.assert_close(got[:, :, 0], unpatched[:, None].expand(-1, 2), **CLOSE)
    assert (got[:, :, 1] - unpatched[:, None]).abs().max() > 1e-3


def test_patching_everything_is_clean_and_nothing_is_corrupted(model_pair, task):
    (model, hf), (prompts, metric) = model_pair, task
    corrupted, end = prompts.corrupted["query"], prompts.positions["END"]
    # the query corruption changes END alone: before layer 0 that is all there is to patch
    got = patch_stream(
        model, prompts.clean, corrupted, metric, "resid_pre", [0, end - 1, end], [0]
    )[:, 0]
    clean, unpatched = metric(hf(prompts.clean).logits), metric(hf(corrupted).logits)
    torch.testing.assert_close(got, torch.stack([unpatched, unpatched, clean], dim=1), **CLOSE)


def test_default_is_every_layer_and_position(random_gpt2):
    clean, corrupted = (repeated_tokens(random_gpt2, 2, 3, seed=seed) for seed in (0, 1))
    every = patch_stream(random_gpt2, clean, corrupted, one_logit)
    assert every.shape == (2, 3, 7)
    some = patch_stream(random_gpt2, clean, corrupted, one_logit, "resid_pre", [5], [2])
    torch.testing.assert_close(every[:, 2:3, 5:6], some)


@pytest.mark.parametrize("site", HEAD_SITES)
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


TOKENS = torch.ones(1, 4).long()


def stream(model, *where):
    return patch_stream(model, TOKENS, TOKENS, one_logit, *where)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: patch_heads(m, TOKENS, TOKENS[:, 1:], one_logit), "corrupted must be .* pos=4"),
        (lambda m: patch_stream(m, TOKENS, TOKENS[:, 1:], one_logit), "corrupted must be .* pos=4"),
    ],
)
@pytest.mark.usefixtures("no_forward")
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)
