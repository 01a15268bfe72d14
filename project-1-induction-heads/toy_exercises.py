"""Exercises 1 to 6 of the induction-heads notebook (part A): answers, cases, typical mistakes."""

from __future__ import annotations

import torch
from torch import Tensor

from utils import heads, toy
from utils.exercises import Exercises

EXERCISES = Exercises()
progress = EXERCISES.progress


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _pattern(n_prompts: int, n_heads: int, length: int) -> Tensor:
    """Random causal attention patterns [prompt head dest src]; rows sum to one."""
    scores = 3 * torch.randn(n_prompts, n_heads, length, length, generator=_generator())
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


# Exercise 1: the loss of each token


def _loss(logits: Tensor, tokens: Tensor) -> Tensor:
    return -logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]


def _loss_cases() -> dict[str, tuple]:
    logits = 2 * torch.randn(2, 6, 5, generator=_generator())
    return {"2 prompts of 6 tokens": (logits, torch.randint(5, (2, 6), generator=_generator()))}


per_token_loss = EXERCISES.add(
    number=1,
    title="per-token loss",
    reference=_loss,
    cases=_loss_cases,
    mistakes={
        "no shift": (
            lambda logits, tokens: -logits.log_softmax(-1).gather(-1, tokens[..., None])[:, 1:, 0],
            "You compare each prediction with the token at its own position; the logits at "
            "position i predict the token at position i + 1, so drop the last logits.",
        ),
        "no shift, all positions": (
            lambda logits, tokens: -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0],
            "You return a loss for every position: the first token is predicted by nothing, and "
            "the logits at position i predict the token at position i + 1.",
        ),
        "logits as log probabilities": (
            lambda logits, tokens: -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0],
            "You take the logits themselves; turn them into log-probabilities first "
            "(log_softmax over the vocabulary).",
        ),
        "sign": (
            lambda logits, tokens: -_loss(logits, tokens),
            "Your signs are turned round: the loss is minus the log-probability, so it is never "
            "negative.",
        ),
        "softmax over positions": (
            lambda logits, tokens: (
                -logits[:, :-1].log_softmax(1).gather(-1, tokens[:, 1:, None])[..., 0]
            ),
            "Your softmax runs over positions; probabilities must sum to one over the vocabulary, "
            "the last axis.",
        ),
        "mean": (
            lambda logits, tokens: _loss(logits, tokens).mean(),
            "You average over everything; return one loss per prompt and predicted token.",
        ),
    },
)


# Exercise 2: the induction stripe of an attention pattern


def _stripe(pattern: Tensor, seq_len: int, back: int, first_dest: int) -> Tensor:
    """Mean attention `back` positions back, over destinations from `first_dest` on."""
    return pattern.diagonal(-back, dim1=-2, dim2=-1)[..., first_dest - back :].mean(-1)


def _stripe_cases() -> dict[str, tuple]:
    return {"1 + 2 x 5 tokens": (_pattern(2, 3, 11), 5), "1 + 3 x 4": (_pattern(2, 3, 13), 4)}


induction_score = EXERCISES.add(
    number=2,
    title="induction score",
    reference=heads.induction_score,
    cases=_stripe_cases,
    mistakes={
        "duplicate token": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len, seq_len + 1),
            "You measure attention to the earlier copy of the token itself, seq_len back; an "
            "induction head looks at the token after it, one position less far back.",
        ),
        "token before the copy": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len + 1, seq_len + 1),
            "You measure attention to the token before the earlier copy (seq_len + 1 back); the "
            "one after it is seq_len - 1 back.",
        ),
        "whole diagonal": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len - 1, seq_len - 1),
            "You average over the whole diagonal, which begins before the second copy does; only "
            "positions from 1 + seq_len on have an earlier copy.",
        ),
        "start token forgotten": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len - 1, seq_len),
            "Your average starts one position early: with the start token in front, the second "
            "copy begins at position 1 + seq_len.",
        ),
        "axes swapped": (
            lambda pattern, seq_len: heads.induction_score(pattern.transpose(-1, -2), seq_len),
            "You have destination and source the wrong way round: rows (dest) attend to columns "
            "(src), so looking back means a diagonal below the main one.",
        ),
        "mean over prompts": (
            lambda pattern, seq_len: heads.induction_score(pattern, seq_len).mean(0),
            "You average over prompts too; return one score per prompt and head.",
        ),
    },
)


# Exercise 3: the previous-token score


def _previous_cases() -> dict[str, tuple]:
    return {"2 prompts of 7 tokens": (_pattern(2, 3, 7),), "1 prompt of 4": (_pattern(1, 2, 4),)}


previous_token_score = EXERCISES.add(
    number=3,
    title="previous-token score",
    reference=heads.previous_token_score,
    cases=_previous_cases,
    mistakes={
        "own position": (
            lambda pattern: pattern.diagonal(dim1=-2, dim2=-1).mean(-1),
            "You read the main diagonal: the attention of each token to itself. The previous "
            "token is one column to the left.",
        ),
        "own position but the first": (
            lambda pattern: pattern.diagonal(dim1=-2, dim2=-1)[..., 1:].mean(-1),
            "You read the main diagonal from the second position on: still the attention of each "
            "token to itself. The previous token is one column to the left.",
        ),
        "next token": (
            lambda pattern: pattern.diagonal(1, dim1=-2, dim2=-1).mean(-1),
            "You read the diagonal above the main one, the next token, to which no causal head "
            "can attend; the previous token is on the diagonal below.",
        ),
        "sum": (
            lambda pattern: pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1),
            "You sum over positions; take their mean, so that 1 means all attention.",
        ),
        "first position counted": (
            lambda pattern: pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1) / pattern.shape[-1],
            "You divide by the number of positions, but the first has no previous token: there is "
            "one entry less.",
        ),
        "mean over heads": (
            lambda pattern: heads.previous_token_score(pattern).mean(-1),
            "You average over heads too; return one score per prompt and head.",
        ),
    },
)


# Exercise 4: the sharpest drop of a loss curve


def _steepest(steps: Tensor, loss: Tensor, window: int) -> tuple[int, int]:
    """First and last index of the window over which the loss falls fastest per step."""
    slope = (loss[window:] - loss[:-window]) / (steps[window:] - steps[:-window])
    return int(slope.argmin()), int(slope.argmin()) + window


def _steepest_per_snapshot(steps: Tensor, loss: Tensor, window: int) -> float:
    start = int((loss[window:] - loss[:-window]).argmin())
    return (steps[start] + steps[start + window]).item() / 2


def _drop_cases() -> dict[str, tuple]:
    # steep where snapshots are dense, a larger but slower fall where they are sparse, and a bump
    steps = torch.tensor([0, 5, 10, 15, 20, 30, 40, 60, 80, 100])
    loss = torch.tensor([4.0, 4.1, 4.0, 3.4, 2.9, 3.5, 2.9, 2.5, 1.5, 1.2])
    return {
        "10 snapshots, window 2": (steps, loss, 2),
        "10 snapshots, window 3": (steps, loss, 3),
    }


sharpest_drop = EXERCISES.add(
    number=4,
    title="step of the sharpest drop",
    reference=toy.sharpest_drop,
    cases=_drop_cases,
    mistakes={
        "index": (
            lambda steps, loss, window: float(_steepest(steps, loss, window)[0]),
            "You return the index of a snapshot; look it up in `steps`, and return the middle of "
            "the window.",
        ),
        "start of the window": (
            lambda steps, loss, window: steps[_steepest(steps, loss, window)[0]],
            "You return where the steepest window begins; return its middle, half-way between "
            "its first and its last step.",
        ),
        "end of the window": (
            lambda steps, loss, window: steps[_steepest(steps, loss, window)[1]],
            "You return where the steepest window ends; return its middle, half-way between its "
            "first and its last step.",
        ),
        "rise": (
            lambda steps, loss, window: toy.sharpest_drop(steps, -loss, window),
            "You found the steepest rise: mind the sign, a fall is earlier loss minus later loss.",
        ),
        "per snapshot": (
            _steepest_per_snapshot,
            "You compare falls per window, but the snapshots are not evenly spaced; divide each "
            "fall by the number of steps it took.",
        ),
        "window ignored": (
            lambda steps, loss, window: toy.sharpest_drop(steps, loss, 1),
            "You compare neighbouring snapshots, so a noisy one wins; take the fall over `window` "
            "intervals.",
        ),
        "lowest loss": (
            lambda steps, loss, window: steps[loss.argmin()],
            "You return the step of the lowest loss; wanted is where it falls fastest.",
        ),
    },
)


# Exercise 5: K-composition of two heads


def _composition(w_ov: Tensor, read: Tensor) -> Tensor:
    return (w_ov @ read).norm() / (w_ov.norm() * read.norm())


def _k_composition(w_v: Tensor, w_o: Tensor, w_q: Tensor, w_k: Tensor) -> Tensor:
    return _composition(w_v @ w_o, w_k @ w_q.T)


def _head_weights() -> tuple[Tensor, ...]:
    shapes = [(12, 4), (4, 12), (12, 4), (12, 4)]
    generator = _generator()
    return tuple(torch.randn(*shape, generator=generator) for shape in shapes)


composition_score = EXERCISES.add(
    number=5,
    title="K-composition score",
    reference=_k_composition,
    cases=lambda: {"two heads of size 4 in 12 dimensions": _head_weights()},
    mistakes={
        "Q-composition": (
            lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_q @ w_k.T),
            "This is Q-composition: you let the writer's output meet W_Q. For K-composition it "
            "must meet W_K, the key side of W_QK (transpose it).",
        ),
        "reader first": (
            lambda w_v, w_o, w_q, w_k: _composition(w_q @ w_k.T, w_v @ w_o),
            "Your product has the reader before the writer; the residual stream passes W_OV of "
            "the writer first, then the reader's W_K.",
        ),
        "not normalised": (
            lambda w_v, w_o, w_q, w_k: (w_v @ w_o @ w_k @ w_q.T).norm(),
            "You return the norm of the product alone; divide it by the norms of W_OV and W_QK, "
            "or large weights count as composition.",
        ),
        "largest singular value": (
            lambda w_v, w_o, w_q, w_k: (
                torch.linalg.matrix_norm(w_v @ w_o @ w_k @ w_q.T, 2)
                / torch.linalg.matrix_norm(w_v @ w_o, 2)
                / torch.linalg.matrix_norm(w_q @ w_k.T, 2)
            ),
            "You use the spectral norm (largest singular value); the score uses the Frobenius "
            "norm, the root of the sum of squares.",
        ),
        "squares": (
            lambda w_v, w_o, w_q, w_k: _k_composition(w_v, w_o, w_q, w_k) ** 2,
            "You compare sums of squares; take their square roots, the norms.",
        ),
        "only W_K": (
            lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_k),
            "You stop at W_K; the score uses the whole QK circuit, W_K followed by W_Q transposed.",
        ),
    },
)


# Exercise 6: does an OV circuit copy?


def _eigenvalues(w_e: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    return torch.linalg.eigvals((w_e @ w_v @ w_o @ w_u).double())


def _copying(w_e: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    values = _eigenvalues(w_e, w_v, w_o, w_u)
    return values.sum().real / values.abs().sum()


def _ov_cases() -> dict[str, tuple]:
    generator = _generator()
    shapes = [(10, 6), (6, 4), (4, 6), (6, 10)]
    w_e, w_v, w_o, w_u = (torch.randn(*shape, generator=generator) for shape in shapes)
    return {
        "a random head": (w_e, w_v, w_o, w_u),
        "a head that half copies": (w_e, w_v, w_o + w_v.T, w_u + w_e.T),
    }


def _singular_values(w_e: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    full = w_e @ w_v @ w_o @ w_u
    return full.trace() / torch.linalg.svdvals(full).sum()


def _without_embedding(w_e: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    values = torch.linalg.eigvals((w_v @ w_o).double())
    return values.sum().real / values.abs().sum()


def _real_parts(w_e: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    real = _eigenvalues(w_e, w_v, w_o, w_u).real
    return real.sum() / real.abs().sum()


eigenvalue_copying = EXERCISES.add(
    number=6,
    title="eigenvalue copying score",
    reference=_copying,
    cases=_ov_cases,
    mistakes={
        "size of the sum": (
            lambda *w: _eigenvalues(*w).sum().abs() / _eigenvalues(*w).abs().sum(),
            "You take the size of the sum, so it cannot be negative; take its real part, a head "
            "that suppresses what it attends to scores below zero.",
        ),
        "sizes over sizes of real parts": (
            _real_parts,
            "You drop the imaginary parts before taking the sizes; divide by the sum of the sizes "
            "|lambda| of the complex eigenvalues.",
        ),
        "not normalised": (
            lambda *w: _eigenvalues(*w).sum().real,
            "You return the sum of the eigenvalues (the trace); divide by the sum of their sizes, "
            "so that the score lies between -1 and 1.",
        ),
        "singular values": (
            _singular_values,
            "You divide by the singular values; use the eigenvalues (torch.linalg.eigvals).",
        ),
        "without embedding": (
            _without_embedding,
            "You look at W_V W_O alone, from residual stream to residual stream; the OV circuit "
            "of tokens is W_E W_V W_O W_U.",
        ),
        "mean": (
            lambda *w: _eigenvalues(*w).mean().real / _eigenvalues(*w).abs().sum(),
            "You mix a mean with a sum: sum both above and below the line.",
        ),
    },
)
