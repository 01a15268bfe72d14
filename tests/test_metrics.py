"""Metrics against Hugging Face logits and plain Python loops."""

import math
import statistics
from itertools import pairwise

import pytest
import torch
from torch import ones

from utils import metrics
from utils.edits import heads_from, hooks, sweep
from utils.prompts import repeated_tokens


@torch.no_grad()
def test_per_token_loss_equals_hugging_face(model_pair):
    model, hf = model_pair
    tokens = repeated_tokens(model, 3, 6)
    log_probs = hf(tokens).logits.log_softmax(-1)
    want = [[-log_probs[p, i, tokens[p, i + 1]].item() for i in range(12)] for p in range(3)]
    loss = metrics.per_token_loss(model, tokens)
    torch.testing.assert_close(loss, torch.tensor(want), atol=2e-4, rtol=0)


def test_a_repeated_bigram_is_found_by_looking_back():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 4, (20, 15), generator=generator)
    again = metrics.repeats_bigram(tokens)
    assert again.shape == (20, 14)
    for row, found in zip(tokens.tolist(), again.tolist(), strict=True):
        pairs = list(pairwise(row))
        assert found == [pair in pairs[:i] for i, pair in enumerate(pairs)]
    assert 0.2 < again.float().mean() < 0.8


def test_per_token_loss_is_the_same_in_small_batches(random_gpt2, monkeypatch):
    tokens = repeated_tokens(random_gpt2, 5, 6)
    whole = metrics.per_token_loss(random_gpt2, tokens)
    monkeypatch.setattr(metrics, "MAX_LOGITS", 2 * 13 * random_gpt2.cfg.d_vocab)
    assert [len(batch) for batch in metrics.token_batches(random_gpt2, tokens)] == [2, 2, 1]
    torch.testing.assert_close(metrics.per_token_loss(random_gpt2, tokens), whole)


def test_last_position_hooks_leave_the_last_logits_alone(model_pair):
    model, _ = model_pair
    tokens = repeated_tokens(model, 2, 5)
    last = model.run_with_hooks(tokens, fwd_hooks=metrics.last_position_hooks())
    assert last.shape[1] == 1
    torch.testing.assert_close(last[:, 0], model(tokens)[:, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("replayed", [True, False])
@torch.no_grad()
def test_with_the_final_scale_held_only_the_edits_own_path_counts(
    small_model, replayed, monkeypatch
):
    if not replayed:
        monkeypatch.setattr("utils.engine.packs.can_replay", lambda *_: False)
    model = small_model
    tokens = torch.arange(33).reshape(3, 11) % model.cfg.d_vocab
    answers = tokens[:, [1, 2]]
    heads = [(0, 1), (1, 0)]
    metric = metrics.LogitDiff(answers, hooks=metrics.hold_final_scale(model, tokens))
    edits = [heads_from(model, [head], 0.0) for head in heads]
    held = sweep(model, tokens, metric, edits)

    _, before = model.run_with_cache(tokens, names_filter=["ln_final.hook_scale"])
    frozen = ("ln_final.hook_scale", lambda scale, hook: before["ln_final.hook_scale"])
    close = {"atol": 1e-4, "rtol": 1e-4}
    for row, edit in zip(held, edits, strict=True):
        logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks(edit), frozen])
        torch.testing.assert_close(row, metrics.logit_diff(logits, answers), **close)
        free = metrics.logit_diff(model.run_with_hooks(tokens, fwd_hooks=hooks(edit)), answers)
        assert (free - row).abs().max() > 1e-3
    nothing = sweep(model, tokens, metric, [[]])[0]
    torch.testing.assert_close(nothing, metrics.logit_diff(model(tokens), answers), **close)


def test_half_losses_leave_out_the_token_nothing_announces():
    loss = torch.rand(3, 10)  # start token and two copies of 5: column i is about token i + 1
    first, second = metrics.half_losses(loss, seq_len=5)
    for p, row in enumerate(loss.tolist()):
        assert first[p].item() == pytest.approx(sum(row[i] for i in (0, 1, 2, 3, 4)) / 5)
        assert second[p].item() == pytest.approx(sum(row[i] for i in (6, 7, 8, 9)) / 4)


@pytest.mark.parametrize("window", [0, 2])
def test_icl_score_counts_positions_of_the_predicted_token(window):
    loss = torch.rand(2, 30)
    score = metrics.icl_score(loss, early=5, late=20, window=window)
    near = range(-window, window + 1)
    for p, row in enumerate(loss.tolist()):  # column i is about token i + 1
        early, late = (statistics.mean(row[at + i - 1] for i in near) for at in (5, 20))
        assert score[p].item() == pytest.approx(late - early, abs=1e-6)


def test_logit_diff_reads_the_last_position():
    logits = torch.rand(3, 4, 10)
    answers = torch.tensor([[1, 2], [3, 4], [9, 0]])
    want = [logits[p, 3, r].item() - logits[p, 3, w].item() for p, (r, w) in enumerate(answers)]
    assert metrics.logit_diff(logits, answers).tolist() == pytest.approx(want)


@torch.no_grad()
def test_probability_rank_and_accuracy_equal_sorting_hugging_face_logits(model_pair):
    model, hf = model_pair
    tokens = repeated_tokens(model, 3, 4)
    rows = hf(tokens).logits[:, -1]
    order = rows.argsort(dim=-1, descending=True)
    answers = torch.tensor([[order[0, 0], order[0, 5]], [order[1, 7], order[1, 6]], [12, 11]])
    logits = model(tokens)
    for p, (right, wrong) in enumerate(answers.tolist()):
        spread = [math.exp(v) for v in (rows[p] - rows[p].max()).tolist()]
        probability = metrics.answer_probability(logits, answers)[p].item()
        assert probability == pytest.approx(spread[right] / sum(spread), rel=1e-3)
        places = [order[p].tolist().index(answer) for answer in (right, wrong)]
        assert metrics.answer_rank(logits, answers)[p] == 1 + places[0]
        assert metrics.accuracy(logits, answers)[p] == float(places[0] < places[1])


def test_rank_and_accuracy_count_ties():
    logits = torch.tensor([[[9.0, 9.0, 9.0], [2.0, 2.0, 1.0]]])
    answers = torch.tensor([[1, 0]])
    assert metrics.answer_rank(logits, answers).tolist() == [1]
    assert metrics.accuracy(logits, answers).tolist() == [0.0]


def test_normalised_effect_is_zero_for_corrupted_and_one_for_clean_on_average():
    clean, corrupted = torch.tensor([4.0, 2.0]), torch.tensor([-1.0, 1.0])
    patched = torch.stack([corrupted, clean, (clean + corrupted) / 2], dim=1)
    effect = metrics.normalised_effect(patched, clean, corrupted)
    assert effect.mean(0).tolist() == pytest.approx([0, 1, 0.5])
    assert effect[:, 1].tolist() == pytest.approx([5 / 3, 1 / 3])


def test_strata_leave_the_spread_between_them_out():
    strata = torch.tensor([0, 1, 2]).repeat(8)
    values = torch.randn(24, generator=torch.Generator().manual_seed(0)) + 10.0 * strata
    stratified, plain = metrics.estimate(values, strata), metrics.estimate(values)
    assert stratified.mean == plain.mean and stratified.stderr < plain.stderr / 5
    means = [metrics.estimate(values[strata == i]) for i in range(3)]
    assert stratified.stderr == pytest.approx(math.hypot(*(m.stderr for m in means)) / 3)
    one = metrics.estimate(values, torch.zeros(24, dtype=torch.int64))
    assert one == pytest.approx(plain)


def test_a_share_is_never_certain():
    got = metrics.proportion(torch.ones(64) > 0)
    assert (got.mean, got.n) == (1.0, 64)
    # Wilson's interval for 64 of 64 is 0.943 to 1
    assert 1.96 * got.stderr == pytest.approx((1 - 0.9434) / 2, abs=1e-3)
    half = torch.arange(1000) < 500
    usual = metrics.estimate(half.float())
    assert metrics.proportion(half).stderr == pytest.approx(usual.stderr, rel=0.01)


def test_estimate_equals_the_statistics_module():
    values = [0.3, 1.7, 2.2, 5.0]
    got = metrics.estimate(torch.tensor(values))
    assert got == pytest.approx((statistics.mean(values), statistics.stdev(values) / 2, 4))
    assert math.isnan(metrics.estimate(torch.tensor([1.0])).stderr)


@pytest.mark.parametrize(
    ("mean", "stderr", "text"),
    [
        (0.834, 0.021, "0.83 ± 0.02"),
        (0.8342, 0.0021, "0.834 ± 0.002"),
        (12.3, 1.5, "12.30 ± 1.50"),
        (1.0, 0.0, "1.00 ± 0.00"),
        (-0.003, 0.02, "0.00 ± 0.02"),
        (1.0, math.nan, "1.00"),
    ],
)
def test_estimates_print_as_many_digits_as_the_error_allows(mean, stderr, text):
    assert str(metrics.Estimate(mean, stderr, 5)) == text


LONG, LOGITS, ANSWERS = torch.ones(2, 60), torch.ones(2, 3, 9), torch.ones(2, 2).long()
MISFIT = r"answers must be .*prompt=2.*\[3, 2\]"


@pytest.mark.parametrize(
    ("metric", "arguments", "message"),
    [
        ("estimate", [ones(3), torch.tensor([0, 0, 1])], "strata: want two values or more in each"),
        ("half_losses", [ones(2, 9), 5], "a loss of 10 columns, got 9"),
        ("half_losses", [ones(2, 20), 5], "a loss of 10 columns, got 20"),
        ("half_losses", [ones(2, 9), 1], "needs 2 or more tokens"),
        ("icl_score", [ones(2, 505)], "early=50 and late=500 with window=10 .* within 1..505"),
        ("icl_score", [LONG, 5, 50, 5], "early=5 and late=50 with window=5"),
        ("icl_score", [LONG, 50, 5, 0], "must be in order"),
        ("logit_diff", [LOGITS, ANSWERS[0]], r"answers must be .*prompt=2.*shape \[2\]"),
        ("accuracy", [LOGITS, ANSWERS[[0, 0, 0]]], MISFIT),
        ("answer_probability", [LOGITS, ANSWERS[[0, 0, 0]]], MISFIT),
        ("answer_rank", [LOGITS, ANSWERS[[0, 0, 0]]], MISFIT),
        ("normalised_effect", [ones(3, 4), ones(2), ones(2)], r"clean must be .*prompt=3.*\[2\]"),
        ("normalised_effect", [ones(2, 4), ones(2), ones(2)], "no effect to restore"),
    ],
)
def test_bad_input_is_named(metric, arguments, message):
    with pytest.raises(ValueError, match=message):
        getattr(metrics, metric)(*arguments)


def test_clusters_give_the_error_over_what_another_sample_would_have_others_of():
    values, frame = torch.tensor([1.0, 3.0, 2.0, 6.0, 0.0, 0.0]), torch.tensor([0, 0, 1, 1, 2, 2])
    found = metrics.estimate(values, clusters=frame)
    assert found.mean == pytest.approx(2) and found.n == 6
    assert found.stderr == pytest.approx(statistics.stdev([2, 4, 0]) / math.sqrt(3))
    assert math.isnan(metrics.estimate(values, clusters=torch.zeros(6, dtype=torch.int64)).stderr)
    with pytest.raises(ValueError, match="strata and clusters: give one of them"):
        metrics.estimate(values, frame, frame)
