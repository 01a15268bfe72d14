"""Ablations against forward hooks on the untouched Hugging Face model."""

import pytest
import torch
from references import log_probs, recorded

from utils import metrics
from utils.ablation import losses, mean_run, pattern_preserving, random_control
from utils.edits import Run, heads_from, hooks, record
from utils.metrics import per_token_loss
from utils.prompts import repeated_tokens

HEADS = [(0, 1), (2, 3), (0, 2)]
CLOSE = {"atol": 2e-3, "rtol": 1e-3}
EXACT = {"atol": 1e-4, "rtol": 0}
pytestmark = pytest.mark.usefixtures("no_grad")


def ours(model, tokens, edits):
    return model.run_with_hooks(tokens, fwd_hooks=hooks(edits)).log_softmax(-1)


def stacked(run):
    return torch.stack(list(run.activations.values()), dim=1)


@pytest.mark.parametrize("kind", ["zero", "mean", "mean over positions", "other run"])
def test_ablations_equal_hugging_face_hooks(model_pair, kind):
    model, hf = model_pair
    tokens = repeated_tokens(model, 2, 5)
    others = repeated_tokens(model, 2 if kind == "other run" else 6, 5, seed=1)
    values = recorded(hf, others)
    if kind == "zero":
        source, values = 0.0, values * 0
    elif kind == "other run":
        source = record(model, others, ["z"])
    else:
        source, values = mean_run(model, others, kind == "mean"), values.mean(0, keepdim=True)
    if kind == "mean over positions":
        values = values[:, :, 1:].mean(2, keepdim=True)
    if source:
        torch.testing.assert_close(stacked(source), values, **CLOSE)

    def edit(layer, z):
        for la, head in HEADS:
            if la == layer:
                z[:, :, head] = values[: len(z), layer, :, head]
        return z

    got = ours(model, tokens, heads_from(model, HEADS, source))
    torch.testing.assert_close(got, log_probs(hf, tokens, edit), **CLOSE)
    assert (got - log_probs(hf, tokens)).abs().max() > 0.02  # it did something


def test_means_are_the_same_in_small_batches(random_gpt2, monkeypatch):
    tokens = repeated_tokens(random_gpt2, 5, 4)
    means = stacked(mean_run(random_gpt2, tokens))
    monkeypatch.setattr(metrics, "MAX_LOGITS", 2 * 9 * random_gpt2.cfg.d_vocab)
    torch.testing.assert_close(stacked(mean_run(random_gpt2, tokens)), means)


def test_pattern_preserving_ablation_equals_hooks_written_out(small_model, draw):
    model, tokens = small_model, draw(small_model)
    heads = [(0, 1), (0, 2), (1, 3)]
    _, cache = model.run_with_cache(tokens)

    def by_hand(layer):
        def zero(z, hook):
            keep = torch.ones_like(z)
            keep[:, :, [head for la, head in heads if la == layer]] = 0
            return z * keep

        stored = cache["pattern", layer]
        attn = f"blocks.{layer}.attn"
        return [(f"{attn}.hook_z", zero), (f"{attn}.hook_pattern", lambda pattern, hook: stored)]

    all_by_hand = [pair for layer in range(model.cfg.n_layers) for pair in by_hand(layer)]
    edits = pattern_preserving(model, iter(heads), record(model, tokens, ["pattern"]))
    got = ours(model, tokens, edits)
    want = model.run_with_hooks(tokens, fwd_hooks=all_by_hand).log_softmax(-1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - ours(model, tokens, heads_from(model, heads, 0.0))).abs().max() > 1e-3


def test_frozen_patterns_are_those_of_the_other_run(random_gpt2):
    tokens, others = repeated_tokens(random_gpt2, 2, 5), repeated_tokens(random_gpt2, 2, 5, seed=1)
    stored = record(random_gpt2, others, ["pattern"])
    edits = pattern_preserving(random_gpt2, [(0, 3)], stored)
    with random_gpt2.hooks(fwd_hooks=hooks(edits)):
        frozen = random_gpt2.run_with_cache(tokens)[1]
    for name, pattern in stored.activations.items():
        torch.testing.assert_close(frozen[name], pattern)
    # the first layer's values are its own, attended to as in the other run
    v = random_gpt2.run_with_cache(tokens)[1]["v", 0]
    z = torch.einsum("phds,pshe->pdhe", frozen["pattern", 0], v)
    z[:, :, 3] = 0
    torch.testing.assert_close(frozen["z", 0], z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_prompts", [1, 3])
def test_losses_equal_one_whole_run_each(small_model, draw, n_prompts):
    model, tokens = small_model, draw(small_model, n_prompts, seed=4)
    top = model.cfg.n_layers - 1
    runs = {
        "none": [],
        "zero": heads_from(model, [(top, 1)], 0.0),
        2: heads_from(model, [(0, 1), (top, 0)], mean_run(model, tokens)),
        "pattern": pattern_preserving(model, [(0, 2)], record(model, tokens, ["pattern"])),
    }
    got = losses(model, tokens, runs)
    assert list(got) == list(runs)
    for key, edits in runs.items():
        want = per_token_loss(model, tokens, hooks(edits))
        torch.testing.assert_close(got[key], want, **EXACT)
    assert (got["zero"] - got["none"]).abs().max() > 1e-3
    some = losses(model, tokens, runs, columns=[1, 7])["zero"]
    torch.testing.assert_close(some[:, [1, 7]], got["zero"][:, [1, 7]], **EXACT)
    assert some.isnan().sum() == some.numel() - 2 * n_prompts


def test_random_control_takes_other_heads_of_the_same_layers(smollm2):
    heads = [(3, 1), (3, 4), (7, 0)]
    draws = random_control(smollm2, heads, n_draws=20, seed=1)
    assert len({tuple(sorted(draw)) for draw in draws}) > 10
    for draw in draws:
        assert len(set(draw)) == 3
        assert sorted(head.layer for head in draw) == [3, 3, 7]
        assert not set(draw) & set(heads)
    assert {h.head for draw in draws for h in draw if h.layer == 7} == set(range(1, 9))
    assert draws == random_control(smollm2, heads, n_draws=20, seed=1)
    assert draws != random_control(smollm2, heads, n_draws=20, seed=2)
    fewer = random_control(smollm2, heads, n_draws=60, seed=1, exclude=[(7, 8), (7, 0), (2, 2)])
    assert {h.head for draw in fewer for h in draw if h.layer == 7} == set(range(1, 8))


@pytest.mark.usefixtures("no_forward")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: mean_run(m, torch.ones(3, 1).long(), False), "prompts of one token"),
        (lambda m: random_control(m, [(0, 0), (0, 1), (0, 2)], 1), "layer 0 has 1 other heads, 3"),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises(ValueError, match=message):
        call(random_gpt2)


def test_patterns_of_other_prompts_are_refused(random_gpt2, draw, no_forward):
    here, there = draw(random_gpt2), draw(random_gpt2, seed=1)
    patterns = Run({f"blocks.{la}.attn.hook_pattern": torch.ones(2, 4, 9, 9) for la in (1, 2)})
    edits = pattern_preserving(random_gpt2, [(1, 0)], patterns._replace(tokens=there))
    with pytest.raises(ValueError, match="was recorded on other prompts"):
        losses(random_gpt2, here, {"ablated": edits})
