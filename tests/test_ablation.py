"""Ablations against forward hooks on the untouched Hugging Face model."""

from contextlib import ExitStack

import pytest
import torch

from utils import metrics
from utils.ablation import (
    ablation_sweep,
    freeze_pattern_hooks,
    head_means,
    head_outputs,
    losses,
    mean_ablation_hooks,
    pattern_preserving_hooks,
    random_control,
    resample_ablation_hooks,
    zero_ablation_hooks,
)
from utils.engine import replay
from utils.heads import cache_heads
from utils.metrics import per_token_loss
from utils.prompts import repeated_tokens

HEADS = [(0, 1), (2, 3), (0, 2)]
CLOSE = {"atol": 2e-3, "rtol": 1e-3}
pytestmark = pytest.mark.usefixtures("no_grad")


def constant_output(hf, layer):
    """What each head of the untouched model writes whatever it attends to: its value bias.

    Compatibility mode moves it out of z, so z = 0 here is z = this there. [head d_head]
    """
    if not hasattr(hf, "transformer"):
        return 0.0
    block, d_model = hf.transformer.h[layer], hf.config.n_embd
    bias = block.ln_1.bias @ block.attn.c_attn.weight + block.attn.c_attn.bias
    return bias[2 * d_model :].reshape(hf.config.n_head, -1)


def hf_log_probs(hf, tokens, edit=None):
    """Log-probabilities with `edit(layer, z)` applied to the heads' outputs; z as ours."""
    gpt2 = hasattr(hf, "transformer")
    blocks = hf.transformer.h if gpt2 else hf.model.layers
    n_heads = hf.config.num_attention_heads

    def hook(layer):
        def apply(module, args):
            z = args[0].unflatten(-1, (n_heads, -1)).clone()
            constant = constant_output(hf, layer)
            return (edit(layer, z - constant) + constant).flatten(-2)

        return apply

    with ExitStack() as stack:
        for layer, block in enumerate(blocks if edit else []):
            output = block.attn.c_proj if gpt2 else block.self_attn.o_proj
            stack.callback(output.register_forward_pre_hook(hook(layer)).remove)
        return hf(tokens).logits.log_softmax(-1)


def hf_z(hf, tokens):
    """The heads' outputs, [prompt layer pos head d_head]."""
    kept = []
    hf_log_probs(hf, tokens, lambda layer, z: kept.append(z) or z)
    return torch.stack(kept, dim=1)


def set_heads(value):
    """An edit that puts `value(layer, head)` at HEADS."""

    def edit(layer, z):
        for la, head in HEADS:
            if la == layer:
                z[:, :, head] = value(layer, head)
        return z

    return edit


def ours(model, tokens, hooks):
    return model.run_with_hooks(tokens, fwd_hooks=hooks).log_softmax(-1)


def test_zero_ablation_equals_hugging_face_hooks(model_pair):
    model, hf = model_pair
    tokens = repeated_tokens(model, 2, 5)
    got = ours(model, tokens, zero_ablation_hooks(HEADS))
    torch.testing.assert_close(got, hf_log_probs(hf, tokens, set_heads(lambda *_: 0.0)), **CLOSE)
    assert (got - hf_log_probs(hf, tokens)).abs().max() > 0.05  # it did something


@pytest.mark.parametrize("per_position", [True, False])
def test_mean_ablation_equals_hugging_face_hooks(model_pair, per_position):
    model, hf = model_pair
    tokens, others = repeated_tokens(model, 2, 5), repeated_tokens(model, 6, 5, seed=1)
    means = hf_z(hf, others).mean(0)
    if not per_position:
        means = means[:, 1:].mean(1, keepdim=True)
    torch.testing.assert_close(head_means(model, others, per_position), means, **CLOSE)
    got = ours(model, tokens, mean_ablation_hooks(HEADS, head_means(model, others, per_position)))
    want = hf_log_probs(hf, tokens, set_heads(lambda layer, head: means[layer, :, head]))
    torch.testing.assert_close(got, want, **CLOSE)


def test_resample_ablation_equals_hugging_face_hooks(model_pair):
    model, hf = model_pair
    tokens, others = repeated_tokens(model, 2, 5), repeated_tokens(model, 2, 5, seed=1)
    z = hf_z(hf, others)
    torch.testing.assert_close(head_outputs(model, others), z, **CLOSE)
    got = ours(model, tokens, resample_ablation_hooks(HEADS, head_outputs(model, others)))
    want = hf_log_probs(hf, tokens, set_heads(lambda layer, head: z[:, layer, :, head]))
    torch.testing.assert_close(got, want, **CLOSE)


def test_means_and_outputs_are_the_same_in_small_batches(random_gpt2, monkeypatch):
    tokens = repeated_tokens(random_gpt2, 5, 4)
    means, z = head_means(random_gpt2, tokens), head_outputs(random_gpt2, tokens)
    monkeypatch.setattr(metrics, "MAX_LOGITS", 2 * 9 * random_gpt2.cfg.d_vocab)
    torch.testing.assert_close(head_means(random_gpt2, tokens), means)
    torch.testing.assert_close(head_outputs(random_gpt2, tokens), z)


@pytest.mark.parametrize("name", ["smollm2", "random_gpt2", "toy2"])
def test_pattern_preserving_ablation_equals_hooks_written_out(request, name):
    model = request.getfixturevalue(name)
    tokens = repeated_tokens(model, 2, 5)
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
    hooks = pattern_preserving_hooks(cache_heads(model, tokens, ["pattern"]), heads)
    got, want = ours(model, tokens, hooks), ours(model, tokens, all_by_hand)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert (got - ours(model, tokens, zero_ablation_hooks(heads))).abs().max() > 1e-3


def test_frozen_patterns_are_those_of_the_stored_run(random_gpt2):
    tokens, others = repeated_tokens(random_gpt2, 2, 5), repeated_tokens(random_gpt2, 2, 5, seed=1)
    stored = cache_heads(random_gpt2, others, ["pattern"])
    with random_gpt2.hooks(fwd_hooks=freeze_pattern_hooks(stored)):
        frozen = cache_heads(random_gpt2, tokens, ["pattern", "z"])
    for layer in range(3):
        torch.testing.assert_close(frozen["pattern", layer], stored["pattern", layer])
    # the first layer's values are its own, attended to as in the stored run
    v = random_gpt2.run_with_cache(tokens)[1]["v", 0]
    z = torch.einsum("phds,pshe->pdhe", stored["pattern", 0], v)
    torch.testing.assert_close(frozen["z", 0], z, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_prompts", [1, 3])
@pytest.mark.parametrize("name", ["smollm2", "random_gpt2", "llama", "neox", "toy2"])
def test_losses_equal_one_whole_run_each(request, name, n_prompts):
    model = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(3, model.cfg.d_vocab, (n_prompts, 9), generator=generator)
    top = model.cfg.n_layers - 1
    patterns = cache_heads(model, tokens, ["pattern"])
    runs = {
        "none": [],
        "zero": zero_ablation_hooks([(top, 1)]),
        2: mean_ablation_hooks([(0, 1), (top, 0)], head_means(model, tokens)),
        "pattern": pattern_preserving_hooks(patterns, [(0, 2)]),
    }
    got = losses(model, tokens, runs)
    assert list(got) == list(runs)
    for key, hooks in runs.items():
        want = per_token_loss(model, tokens, hooks)
        torch.testing.assert_close(got[key], want, atol=1e-4, rtol=0)
    assert (got["zero"] - got["none"]).abs().max() > 1e-3
    some = losses(model, tokens, runs, columns=[1, 7])["zero"]
    torch.testing.assert_close(some[:, [1, 7]], got["zero"][:, [1, 7]], atol=1e-4, rtol=0)
    assert some.isnan().sum() == some.numel() - 2 * n_prompts


def test_losses_need_no_unembedding_and_the_plain_path_has_the_same(random_gpt2, monkeypatch):
    tokens = repeated_tokens(random_gpt2, 2, 5)
    runs = {"none": [], "zero": zero_ablation_hooks([(1, 2)])}
    with monkeypatch.context() as patched:
        patched.setattr(replay.Replay, "_unembed", None)
        got = losses(random_gpt2, tokens, runs, columns=[2, 6])
    refused = type(replay._refused)([random_gpt2])
    monkeypatch.setattr(replay, "_refused", refused)
    plain = losses(random_gpt2, tokens, runs, columns=[2, 6])
    for name in runs:
        torch.testing.assert_close(got[name], plain[name], atol=1e-4, rtol=0, equal_nan=True)


@pytest.mark.parametrize("name", ["smollm2", "random_gpt2", "toy2"])
def test_ablation_sweep_equals_single_ablations(request, name):
    model = request.getfixturevalue(name)
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(3, model.cfg.d_vocab, (2, 8), generator=generator)
    n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads

    def metric(logits):
        return logits[:, -1, 7]

    means = head_means(model, tokens)
    for hooks_for in (zero_ablation_hooks, lambda heads: mean_ablation_hooks(heads, means)):
        swept = ablation_sweep(model, tokens, metric, hooks_for)
        assert swept.shape == (2, n_layers, n_heads)
        for layer, head in [(0, 0), (n_layers // 2, 1), (n_layers - 1, n_heads - 1)]:
            single = metric(model.run_with_hooks(tokens, fwd_hooks=hooks_for([(layer, head)])))
            torch.testing.assert_close(swept[:, layer, head], single, atol=1e-4, rtol=0)


def test_ablations_leave_no_hook_and_change_no_weight(random_gpt2):
    tokens = repeated_tokens(random_gpt2, 2, 4)
    before = random_gpt2(tokens)
    per_token_loss(random_gpt2, tokens, zero_ablation_hooks([(1, 1)]))
    losses(random_gpt2, tokens, {"zero": zero_ablation_hooks([(1, 1)])})
    assert not any(point.fwd_hooks for point in random_gpt2.hook_dict.values())
    assert torch.equal(random_gpt2(tokens), before)


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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: zero_ablation_hooks([]), "heads is empty"),
        (lambda m: zero_ablation_hooks([(0, -1)]), "must not be negative"),
        (lambda m: mean_ablation_hooks([(0, 0)], torch.ones(3, 4)), r"means must be \[layer pos"),
        (lambda m: resample_ablation_hooks([(0, 0)], torch.ones(3)), r"z must be \[prompt layer"),
        (lambda m: freeze_pattern_hooks({"hook_embed": torch.ones(1)}), "holds no hook_pattern"),
        (lambda m: pattern_preserving_hooks({}, [(0, 0)]), "patterns holds no hook_pattern"),
        (lambda m: losses(m, torch.ones(1, 4).long(), {}, columns=[3]), r"columns .* 0\.\.2"),
        (lambda m: losses(m, torch.ones(1, 4).long(), {}), "interventions is empty"),
        (
            lambda m: random_control(m, [(0, 0), (0, 1), (0, 2)], 1),
            "layer 0 has 1 other heads, 3 are wanted",
        ),
        (lambda m: random_control(m, [(0, 0)], 0), "n_draws must be at least 1"),
        (lambda m: random_control(m, [(0, 4)], 1), "no head L0H4"),
        (lambda m: head_means(m, torch.ones(2).long()[:0, None]), "is empty"),
        (
            lambda m: ours(m, torch.ones(1, 4).long(), zero_ablation_hooks([(0, 4)])),
            "no head 4 in layer 0 of 4 heads",
        ),
        (
            lambda m: ours(
                m,
                torch.ones(1, 4).long(),
                mean_ablation_hooks([(0, 0)], torch.zeros(3, 5, 4, 16)),
            ),
            "taken from 5 positions, this run has 4",
        ),
        (
            lambda m: ours(
                m,
                torch.ones(2, 4).long(),
                resample_ablation_hooks([(0, 0)], torch.zeros(3, 3, 4, 4, 16)),
            ),
            "taken from 3 prompts, this run has 2",
        ),
        (
            lambda m: ours(
                m,
                torch.ones(2, 4).long(),
                freeze_pattern_hooks(cache_heads(m, torch.ones(2, 5).long(), ["pattern"])),
            ),
            r"stored pattern is \(2, 4, 5, 5\), this run's \(2, 4, 4, 4\)",
        ),
    ],
)
def test_bad_input_is_named(random_gpt2, call, message):
    with pytest.raises((ValueError, TypeError), match=message):
        call(random_gpt2)
