"""Exercises 1 to 6: answers as a learner would write them, right and wrong, and what is said."""

import einops
import pytest
import torch

import induction_exercises as checks


def told(capsys, check, answer):
    check(answer)
    return capsys.readouterr().out.strip()


# Right answers, each by another way than the reference


def loss_by_cross_entropy(logits, tokens):
    flat = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), reduction="none"
    )
    return flat.reshape(len(tokens), -1)


def stripe_by_loop(pattern, seq_len):
    n = pattern.shape[-1]
    later = range(1 + seq_len, n)
    return sum(pattern[:, :, dest, dest - seq_len + 1] for dest in later) / len(later)


def previous_by_indexing(pattern):
    dest = torch.arange(1, pattern.shape[-1])
    return pattern[..., dest, dest - 1].mean(dim=-1)


def drop_by_loop(steps, loss, window):
    best, where = None, None
    for i in range(len(steps) - window):
        slope = (loss[i + window] - loss[i]) / (steps[i + window] - steps[i])
        if best is None or slope < best:
            best, where = slope, i
    return float(steps[where] + steps[where + window]) / 2


def k_composition_by_trace(w_v, w_o, w_q, w_k):
    product = w_v @ w_o @ w_k @ w_q.T
    size = [torch.trace(m @ m.T).sqrt() for m in (product, w_v @ w_o, w_q @ w_k.T)]
    return size[0] / size[1] / size[2]


def copying_of_small_matrix(w_e, w_v, w_o, w_u):
    values = torch.linalg.eigvals(w_o @ w_u @ w_e @ w_v)
    return (values.sum() / values.abs().sum()).real


RIGHT = {
    "per_token_loss": loss_by_cross_entropy,
    "induction_score": stripe_by_loop,
    "previous_token_score": previous_by_indexing,
    "sharpest_drop": drop_by_loop,
    "composition_score": k_composition_by_trace,
    "eigenvalue_copying": copying_of_small_matrix,
}


@pytest.mark.parametrize("name", RIGHT)
def test_right_answers_are_right(name, capsys):
    check = getattr(checks, name)
    assert told(capsys, check, RIGHT[name]) == f"{check}: right."


# Wrong answers


def loss_of_own_token(logits, tokens):
    probs = logits.softmax(dim=-1)[:, 1:]
    return -torch.gather(probs, 2, tokens[:, 1:].unsqueeze(-1)).squeeze(-1).log()


def loss_everywhere(logits, tokens):
    return -torch.gather(logits.log_softmax(-1), 2, tokens.unsqueeze(2)).squeeze(2)


def loss_without_softmax(logits, tokens):
    return -torch.gather(logits[:, :-1], 2, tokens[:, 1:].unsqueeze(2)).squeeze(2)


def log_probability(logits, tokens):
    return logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)


def loss_softmax_over_positions(logits, tokens):
    log_probs = logits[:, :-1].softmax(dim=1).log()
    return -log_probs.gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)


def mean_loss(logits, tokens):
    return torch.nn.functional.cross_entropy(
        einops.rearrange(logits[:, :-1], "b p v -> b v p"), tokens[:, 1:]
    )


def duplicate_stripe(pattern, seq_len):
    return pattern.diagonal(-seq_len, -2, -1)[..., 1:].mean(-1)


def stripe_one_too_far(pattern, seq_len):
    later = range(1 + seq_len, pattern.shape[-1])
    return torch.stack([pattern[:, :, d, d - seq_len - 1] for d in later]).mean(0)


def whole_stripe(pattern, seq_len):
    return pattern.diagonal(1 - seq_len, -2, -1).mean(-1)


def stripe_from_seq_len(pattern, seq_len):
    later = torch.arange(seq_len, pattern.shape[-1])
    return pattern[:, :, later, later - seq_len + 1].mean(-1)


def stripe_of_src_dest(pattern, seq_len):
    return pattern.diagonal(seq_len - 1, dim1=-2, dim2=-1)[..., 2:].mean(-1)


def stripe_per_head(pattern, seq_len):
    return stripe_by_loop(pattern, seq_len).mean(dim=0)


def own_token(pattern):
    return torch.diagonal(pattern, dim1=2, dim2=3).mean(-1)


def own_token_from_second(pattern):
    dest = torch.arange(1, pattern.shape[-1])
    return pattern[..., dest, dest].mean(-1)


def next_token(pattern):
    dest = torch.arange(pattern.shape[-1] - 1)
    return pattern[..., dest, dest + 1].mean(-1)


def previous_summed(pattern):
    return einops.reduce(pattern.diagonal(-1, 2, 3), "b h p -> b h", "sum")


def previous_over_all_positions(pattern):
    total = 0
    for dest in range(1, pattern.shape[-1]):
        total = total + pattern[:, :, dest, dest - 1]
    return total / pattern.shape[-1]


def previous_per_prompt(pattern):
    return previous_by_indexing(pattern).mean(1)


def fastest(steps, loss, window):
    slopes = [
        float(loss[i] - loss[i + window]) / float(steps[i + window] - steps[i])
        for i in range(len(steps) - window)
    ]
    return slopes.index(max(slopes))


def drop_as_index(steps, loss, window):
    return fastest(steps, loss, window)


def drop_at_start(steps, loss, window):
    return steps[fastest(steps, loss, window)].item()


def drop_at_end(steps, loss, window):
    return steps[fastest(steps, loss, window) + window].item()


def rise_instead(steps, loss, window):
    change = (loss[window:] - loss[:-window]) / (steps[window:] - steps[:-window])
    i = change.argmax()
    return (steps[i] + steps[i + window]).item() / 2


def drop_per_snapshot(steps, loss, window):
    i = (loss[:-window] - loss[window:]).argmax()
    return (steps[i] + steps[i + window]).item() / 2


def drop_between_neighbours(steps, loss, window):
    i = (loss.diff() / steps.diff()).argmin()
    return (steps[i] + steps[i + 1]).item() / 2


def lowest(steps, loss, window):
    return steps[torch.argmin(loss)].item()


def frobenius(m):
    return (m**2).sum().sqrt()


def q_composition(w_v, w_o, w_q, w_k):
    ov, qk = w_v @ w_o, w_q @ w_k.T
    return frobenius(ov @ qk) / frobenius(ov) / frobenius(qk)


def reader_before_writer(w_v, w_o, w_q, w_k):
    ov, qk = w_v @ w_o, w_q @ w_k.T
    return frobenius(qk @ ov) / frobenius(ov) / frobenius(qk)


def unnormalised(w_v, w_o, w_q, w_k):
    return frobenius(w_v @ w_o @ (w_q @ w_k.T).T)


def spectral(w_v, w_o, w_q, w_k):
    ov, qk = w_v @ w_o, w_q @ w_k.T
    top = [torch.linalg.svdvals(m)[0] for m in (ov @ qk.T, ov, qk)]
    return top[0] / (top[1] * top[2])


def squared(w_v, w_o, w_q, w_k):
    ov, qk = w_v @ w_o, w_q @ w_k.T
    return (ov @ qk.T).pow(2).sum() / (ov.pow(2).sum() * qk.pow(2).sum())


def only_keys(w_v, w_o, w_q, w_k):
    ov = w_v @ w_o
    return frobenius(ov @ w_k) / frobenius(ov) / frobenius(w_k)


def eigenvalues(w_e, w_v, w_o, w_u):
    return torch.linalg.eigvals(w_e @ (w_v @ w_o) @ w_u)


def size_of_sum(*weights):
    values = eigenvalues(*weights)
    return abs(values.sum()) / abs(values).sum()


def real_parts(*weights):
    values = eigenvalues(*weights).real
    return values.sum() / values.abs().sum()


def trace_only(w_e, w_v, w_o, w_u):
    return torch.trace(w_e @ w_v @ w_o @ w_u)


def with_singular_values(w_e, w_v, w_o, w_u):
    circuit = w_e @ w_v @ w_o @ w_u
    return torch.trace(circuit) / torch.linalg.matrix_norm(circuit, ord="nuc")


def head_alone(w_e, w_v, w_o, w_u):
    values = torch.linalg.eigvals(w_v @ w_o)
    return values.real.sum() / values.abs().sum()


def mean_over_sum(*weights):
    values = eigenvalues(*weights)
    return values.real.mean() / values.abs().sum()


WRONG = [
    ("per_token_loss", loss_of_own_token, "at its own position"),
    ("per_token_loss", loss_everywhere, "a loss for every position"),
    ("per_token_loss", loss_without_softmax, "the logits themselves"),
    ("per_token_loss", log_probability, "signs are turned round"),
    ("per_token_loss", loss_softmax_over_positions, "softmax runs over positions"),
    ("per_token_loss", mean_loss, "average over everything"),
    ("induction_score", duplicate_stripe, "earlier copy of the token itself"),
    ("induction_score", stripe_one_too_far, "token before the earlier copy"),
    ("induction_score", whole_stripe, "whole diagonal"),
    ("induction_score", stripe_from_seq_len, "one position early"),
    ("induction_score", stripe_of_src_dest, "wrong way round"),
    ("induction_score", stripe_per_head, "average over prompts"),
    ("previous_token_score", own_token, "main diagonal: the attention of each token to itself"),
    ("previous_token_score", own_token_from_second, "from the second position on"),
    ("previous_token_score", next_token, "the next token"),
    ("previous_token_score", previous_summed, "take their mean"),
    ("previous_token_score", previous_over_all_positions, "one entry less"),
    ("previous_token_score", previous_per_prompt, "average over heads"),
    ("sharpest_drop", drop_as_index, "the index of a snapshot"),
    ("sharpest_drop", drop_at_start, "where the steepest window begins"),
    ("sharpest_drop", drop_at_end, "where the steepest window ends"),
    ("sharpest_drop", rise_instead, "steepest rise"),
    ("sharpest_drop", drop_per_snapshot, "not evenly spaced"),
    ("sharpest_drop", drop_between_neighbours, "neighbouring snapshots"),
    ("sharpest_drop", lowest, "the lowest loss"),
    ("composition_score", q_composition, "This is Q-composition"),
    ("composition_score", reader_before_writer, "reader before the writer"),
    ("composition_score", unnormalised, "divide it by the norms"),
    ("composition_score", spectral, "spectral norm"),
    ("composition_score", squared, "sums of squares"),
    ("composition_score", only_keys, "stop at W_K"),
    ("eigenvalue_copying", size_of_sum, "size of the sum"),
    ("eigenvalue_copying", real_parts, "drop the imaginary parts"),
    ("eigenvalue_copying", trace_only, "(the trace)"),
    ("eigenvalue_copying", with_singular_values, "singular values"),
    ("eigenvalue_copying", head_alone, "W_V W_O alone"),
    ("eigenvalue_copying", mean_over_sum, "mix a mean with a sum"),
]


@pytest.mark.parametrize(("name", "answer", "hint"), WRONG, ids=[w[1].__name__ for w in WRONG])
def test_wrong_answers_are_told_their_mistake(name, answer, hint, capsys):
    check = getattr(checks, name)
    said = told(capsys, check, answer)
    assert said.startswith(f"{check}: not right yet. ")
    assert hint in said


@pytest.mark.parametrize("number", range(1, 7))
def test_every_mistake_was_tried(number):
    """No message that the answers above never bring up."""
    exercise = checks.EXERCISES.all[number]
    hints = [hint for name, _, hint in WRONG if getattr(checks, name) is exercise]
    assert len(exercise.mistakes) >= 3
    for _, message in exercise.mistakes.values():
        assert any(hint in message for hint in hints)
