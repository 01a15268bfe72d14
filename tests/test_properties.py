"""What holds for any numbers: scores lie in 0..1, parts add up, order and batches do not matter."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from census.training import sharpest_drop
from utils import attribution, heads, metrics, patching, toy, weights
from utils.edits import sweep
from utils.metrics import LogitDiff

FEW = settings(max_examples=25, deadline=None, derandomize=True)
RUNS = settings(max_examples=5, deadline=None, derandomize=True)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
MODEL = toy.tiny_model(2).requires_grad_(False)
seeds, sizes = st.integers(0, 2**32 - 1), st.integers(2, 6)


def close(got, want):
    torch.testing.assert_close(got, want, **CLOSE)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def shuffled(seed, n):
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def attention(seed, n_prompts, seq_len, n_copies=2):
    """Attention of three heads that looks back alone, on copies of some tokens."""
    length = 1 + seq_len * n_copies
    scores = 3 * draw(seed, n_prompts, 3, length, length)
    hidden = torch.ones(length, length).triu(1).bool()
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def prompts(seed, n_prompts, length=6):
    """Prompts of the tiny model with two different answers each."""
    rank = draw(seed, n_prompts, MODEL.cfg.d_vocab).argsort(1)
    return rank[:, :length], rank[:, -2:]


@FEW
@given(seeds, sizes, sizes)
def test_scores_of_attention_lie_between_0_and_1(seed, n_prompts, seq_len):
    pattern = attention(seed, n_prompts, seq_len)
    tokens = torch.cat([torch.zeros(1), *[1 + torch.arange(seq_len)] * 2]).long()
    found = [
        heads.previous_token_score(pattern),
        heads.duplicate_token_score(pattern, seq_len),
        heads.induction_score(pattern, seq_len),
        heads.prefix_matching_score(pattern, tokens.repeat(n_prompts, 1)),
    ]
    for score in found:
        assert score.shape == (n_prompts, 3)
        assert ((score >= 0) & (score <= 1 + 1e-6)).all()
    # what follows the one earlier copy is what an induction head attends to
    close(found[2], found[3])


@FEW
@given(seeds, sizes)
def test_the_order_of_prompts_changes_the_order_of_results_alone(seed, n):
    order = shuffled(seed, n)
    logits, answers = draw(seed, n, 3, 9), draw(seed + 1, n, 9).argsort(1)[:, :2]
    loss, pattern = draw(seed, n, 12), attention(seed, n, 4)
    for f, *given_ in [
        (metrics.logit_diff, logits, answers),
        (metrics.accuracy, logits, answers),
        (metrics.answer_probability, logits, answers),
        (metrics.answer_rank, logits, answers),
        (lambda x: metrics.half_losses(x, 6).second, loss),
        (lambda x: metrics.icl_score(x, 3, 9, 1), loss),
        (heads.previous_token_score, pattern),
        (lambda x: heads.induction_score(x, 4), pattern),
    ]:
        close(f(*(x[order] for x in given_)), f(*given_)[order])


@FEW
@given(seeds, st.integers(2, 30), st.floats(-5, 5), st.floats(0.1, 5))
def test_an_estimate_moves_and_stretches_with_its_values(seed, n, shift, scale):
    values = draw(seed, n)
    plain, order = metrics.estimate(values), shuffled(seed, n)
    again, moved = metrics.estimate(values[order]), metrics.estimate(shift + scale * values)
    assert again == pytest.approx(plain, abs=1e-5)
    assert moved == pytest.approx((shift + scale * plain.mean, scale * plain.stderr, n), abs=1e-4)
    share = metrics.proportion(values > 0)
    assert 0 <= share.mean <= 1 and 0 < share.stderr < 1


@FEW
@given(seeds, sizes, st.floats(-20, 20))
def test_what_is_added_to_every_logit_changes_no_answer(seed, n, shift):
    logits, answers = draw(seed, n, 2, 9), draw(seed + 1, n, 9).argsort(1)[:, :2]
    for f in (metrics.logit_diff, metrics.answer_probability):
        close(f(logits + shift, answers), f(logits, answers))
    rank = metrics.answer_rank(logits, answers)
    probability = metrics.answer_probability(logits, answers)
    assert ((rank >= 1) & (rank <= 9)).all()
    assert ((probability >= 0) & (probability <= 1)).all()
    # the right answer's rank is 1 and more where the wrong one is above it
    assert (rank[metrics.accuracy(logits, answers) == 0] > 1).all()


@FEW
@given(seeds, st.integers(4, 20))
def test_all_of_a_change_forms_over_the_whole_training(seed, n):
    steps, values = 10 * torch.arange(n), draw(seed, n)
    assume((values[-1] - values[0]).abs() > 0.01)
    whole = toy.share_formed(steps, values, centre=5.0 * n, width=20.0 * n)
    parts = [toy.share_formed(steps, values, centre=10.0 * i + 5, width=10.0) for i in range(n)]
    assert whole == pytest.approx(1)
    assert sum(parts) == pytest.approx(1, abs=1e-3)
    assert 0 <= sharpest_drop(steps, values) <= steps[-1]


@FEW
@given(seeds, sizes)
def test_values_of_heads_come_in_the_order_of_the_heads(seed, n):
    values = draw(seed, n, 2, 3)
    every = [(layer, head) for layer in range(2) for head in range(3)]
    order = shuffled(seed, 6).tolist()
    mixed = attribution.of_heads(values, [every[i] for i in order])
    close(mixed, attribution.of_heads(values, every)[:, order])
    names = heads.top_heads(values[0], k=6)
    ranked = torch.stack([values[0][head] for head in names])
    assert (ranked.diff() <= 0).all()


# Runs of a tiny model


@RUNS
@given(seeds, st.integers(1, 3))
def test_patching_prompts_with_themselves_is_nothing(seed, n):
    tokens, answers = prompts(seed, n)
    metric = LogitDiff(answers)
    plain = metrics.logit_diff(MODEL(tokens), answers)
    close(sweep(MODEL, tokens, metric, [[]])[0], plain)
    for site in ("z", "pattern", "k"):
        found = patching.patch_heads(MODEL, tokens, tokens, metric, site)
        close(found, plain[:, None, None].expand_as(found))
    found = patching.patch_stream(MODEL, tokens, tokens, metric)
    close(found, plain[:, None, None].expand_as(found))
    assert attribution.attribution_patching(MODEL, tokens, tokens, metric).abs().max() < 1e-5


@RUNS
@given(seeds, st.integers(2, 4))
def test_batches_and_the_order_of_prompts_and_heads_change_no_figure(seed, n):
    (tokens, answers), (corrupted, _) = prompts(seed, n), prompts(seed + 1, n)
    order = shuffled(seed, n)
    whole = patching.patch_heads(MODEL, tokens, corrupted, LogitDiff(answers))
    rows = [
        patching.patch_heads(
            MODEL, tokens[i : i + 1], corrupted[i : i + 1], LogitDiff(answers[[i]])
        )
        for i in order.tolist()
    ]
    close(torch.cat(rows), whole[order])
    some = [(1, 2), (0, 0), (1, 0)]
    chosen = patching.patch_heads(MODEL, tokens, corrupted, LogitDiff(answers), heads=some)
    close(chosen, attribution.of_heads(whole, some))
    loss = metrics.per_token_loss(MODEL, tokens)
    close(metrics.per_token_loss(MODEL, tokens[order]), loss[order])


@FEW
@given(st.integers(0, 1000))
def test_composition_lies_between_0_and_1_in_any_order_of_heads(seed):
    random = weights.composition_baseline(MODEL, n=3)
    assert ((random >= 0) & (random <= 1)).all()
    writers, readers = [(0, h) for h in range(3)], [(1, h) for h in range(3)]
    order = shuffled(seed, 3).tolist()
    for kind in "QKV":
        found = weights.composition_scores(MODEL, kind, writers, readers)
        assert ((found >= 0) & (found <= 1)).all()
        mixed = [writers[i] for i in order]
        close(weights.composition_scores(MODEL, kind, mixed, readers), found[order])
