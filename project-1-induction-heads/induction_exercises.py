"""The exercises of the induction-heads notebook: right answers, test cases, typical mistakes."""

from functools import partial

import torch
from torch import Tensor
from transformer_lens.utilities import lm_cross_entropy_loss

from utils import heads, metrics, toy
from utils.exercises import Exercises, run_hook, set_at

EXERCISES = Exercises()
progress = EXERCISES.progress
ALL = slice(None)


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _pattern(n_prompts: int, n_heads: int, length: int) -> Tensor:
    """Random causal attention patterns [prompt head dest src]; rows sum to one."""
    scores = 3 * torch.randn(n_prompts, n_heads, length, length, generator=_generator())
    future = torch.ones(length, length, dtype=torch.bool).triu(1)
    return scores.masked_fill(future, -torch.inf).softmax(-1)


# Exercise 1: the loss of each token


def _loss_cases() -> dict[str, tuple]:
    logits = 2 * torch.randn(2, 6, 5, generator=_generator())
    return {"2 prompts of 6 tokens": (logits, torch.randint(5, (2, 6), generator=_generator()))}


per_token_loss = EXERCISES.add(
    number=1,
    title="per-token loss",
    reference=partial(lm_cross_entropy_loss, per_token=True),
    cases=_loss_cases,
    mistakes={
        "You compare each prediction with the token at its own position; the logits at "
        "position i predict the token at position i + 1, so drop the last logits.": (
            lambda logits, tokens: -logits.log_softmax(-1).gather(-1, tokens[..., None])[:, 1:, 0]
        ),
        "You return a loss for every position: the first token is predicted by nothing, and "
        "the logits at position i predict the token at position i + 1.": (
            lambda logits, tokens: -logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
        ),
        "You take the logits themselves; turn them into log-probabilities first "
        "(log_softmax over the vocabulary).": (
            lambda logits, tokens: -logits[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
        ),
        "Your signs are turned round: the loss is minus the log-probability, so it is never "
        "negative.": (
            lambda logits, tokens: -lm_cross_entropy_loss(logits, tokens, per_token=True)
        ),
        "Your softmax runs over positions; probabilities must sum to one over the vocabulary, "
        "the last axis.": (
            lambda logits, tokens: (
                -logits[:, :-1].log_softmax(1).gather(-1, tokens[:, 1:, None])[..., 0]
            )
        ),
        "You average over everything; return one loss per prompt and predicted token.": (
            lm_cross_entropy_loss
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
        "You measure attention to the earlier copy of the token itself, seq_len back; an "
        "induction head looks at the token after it, one position less far back.": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len, seq_len + 1)
        ),
        "You measure attention to the token before the earlier copy (seq_len + 1 back); the "
        "one after it is seq_len - 1 back.": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len + 1, seq_len + 1)
        ),
        "You average over the whole diagonal, which begins before the second copy does; only "
        "positions from 1 + seq_len on have an earlier copy.": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len - 1, seq_len - 1)
        ),
        "Your average starts one position early: with the start token in front, the second "
        "copy begins at position 1 + seq_len.": (
            lambda pattern, seq_len: _stripe(pattern, seq_len, seq_len - 1, seq_len)
        ),
        "You have destination and source the wrong way round: rows (dest) attend to columns "
        "(src), so looking back means a diagonal below the main one.": (
            lambda pattern, seq_len: heads.induction_score(pattern.transpose(-1, -2), seq_len)
        ),
        "You average over prompts too; return one score per prompt and head.": (
            lambda pattern, seq_len: heads.induction_score(pattern, seq_len).mean(0)
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
        "You read the main diagonal: the attention of each token to itself. The previous "
        "token is one column to the left.": (
            lambda pattern: pattern.diagonal(dim1=-2, dim2=-1).mean(-1)
        ),
        "You read the main diagonal from the second position on: still the attention of each "
        "token to itself. The previous token is one column to the left.": (
            lambda pattern: pattern.diagonal(dim1=-2, dim2=-1)[..., 1:].mean(-1)
        ),
        "You read the diagonal above the main one, the next token, to which no causal head "
        "can attend; the previous token is on the diagonal below.": (
            lambda pattern: pattern.diagonal(1, dim1=-2, dim2=-1).mean(-1)
        ),
        "You sum over positions; take their mean, so that 1 means all attention.": (
            lambda pattern: pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1)
        ),
        "You divide by the number of positions, but the first has no previous token: there is "
        "one entry less.": (
            lambda pattern: pattern.diagonal(-1, dim1=-2, dim2=-1).sum(-1) / pattern.shape[-1]
        ),
        "You average over heads too; return one score per prompt and head.": (
            lambda pattern: heads.previous_token_score(pattern).mean(-1)
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
        "You return the index of a snapshot; look it up in `steps`, and return the middle of "
        "the window.": (lambda steps, loss, window: float(_steepest(steps, loss, window)[0])),
        "You return where the steepest window begins; return its middle, half-way between "
        "its first and its last step.": (
            lambda steps, loss, window: steps[_steepest(steps, loss, window)[0]]
        ),
        "You return where the steepest window ends; return its middle, half-way between its "
        "first and its last step.": (
            lambda steps, loss, window: steps[_steepest(steps, loss, window)[1]]
        ),
        "You found the steepest rise: mind the sign, a fall is earlier loss minus later loss.": (
            lambda steps, loss, window: toy.sharpest_drop(steps, -loss, window)
        ),
        "You compare falls per window, but the snapshots are not evenly spaced; divide each "
        "fall by the number of steps it took.": (_steepest_per_snapshot),
        "You compare neighbouring snapshots, so a noisy one wins; take the fall over `window` "
        "intervals.": (lambda steps, loss, window: toy.sharpest_drop(steps, loss, 1)),
        "You return the step of the lowest loss; wanted is where it falls fastest.": (
            lambda steps, loss, window: steps[loss.argmin()]
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
        "This is Q-composition: you let the writer's output meet W_Q. For K-composition it "
        "must meet W_K, the key side of W_QK (transpose it).": (
            lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_q @ w_k.T)
        ),
        "Your product has the reader before the writer; the residual stream passes W_OV of "
        "the writer first, then the reader's W_K.": (
            lambda w_v, w_o, w_q, w_k: _composition(w_q @ w_k.T, w_v @ w_o)
        ),
        "You return the norm of the product alone; divide it by the norms of W_OV and W_QK, "
        "or large weights count as composition.": (
            lambda w_v, w_o, w_q, w_k: (w_v @ w_o @ w_k @ w_q.T).norm()
        ),
        "You use the spectral norm (largest singular value); the score uses the Frobenius "
        "norm, the root of the sum of squares.": (
            lambda w_v, w_o, w_q, w_k: (
                torch.linalg.matrix_norm(w_v @ w_o @ w_k @ w_q.T, 2)
                / torch.linalg.matrix_norm(w_v @ w_o, 2)
                / torch.linalg.matrix_norm(w_q @ w_k.T, 2)
            )
        ),
        "You compare sums of squares; take their square roots, the norms.": (
            lambda w_v, w_o, w_q, w_k: _k_composition(w_v, w_o, w_q, w_k) ** 2
        ),
        "You stop at W_K; the score uses the whole QK circuit, W_K followed by W_Q transposed.": (
            lambda w_v, w_o, w_q, w_k: _composition(w_v @ w_o, w_k)
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
        "You take the size of the sum, so it cannot be negative; take its real part, a head "
        "that suppresses what it attends to scores below zero.": (
            lambda *w: _eigenvalues(*w).sum().abs() / _eigenvalues(*w).abs().sum()
        ),
        "You drop the imaginary parts before taking the sizes; divide by the sum of the sizes "
        "|lambda| of the complex eigenvalues.": (_real_parts),
        "You return the sum of the eigenvalues (the trace); divide by the sum of their sizes, "
        "so that the score lies between -1 and 1.": (lambda *w: _eigenvalues(*w).sum().real),
        "You divide by the singular values; use the eigenvalues (torch.linalg.eigvals).": (
            _singular_values
        ),
        "You look at W_V W_O alone, from residual stream to residual stream; the OV circuit "
        "of tokens is W_E W_V W_O W_U.": (_without_embedding),
        "You mix a mean with a sum: sum both above and below the line.": (
            lambda *w: _eigenvalues(*w).mean().real / _eigenvalues(*w).abs().sum()
        ),
    },
)


# Exercise 7: the in-context-learning score


def _icl_cases() -> dict[str, tuple]:
    loss = torch.rand(3, 40, generator=_generator(7))
    return {"3 prompts of 41 tokens": (loss, 5, 35)}


icl_score = EXERCISES.add(
    number=7,
    title="in-context-learning score",
    reference=lambda loss, early, late: metrics.icl_score(loss, early, late, window=0),
    cases=_icl_cases,
    mistakes={
        "You are one token late: column 0 of `loss` is about token 1, so token `late` is in "
        "column `late - 1`.": (lambda loss, early, late: loss[:, late] - loss[:, early]),
        "The sign is turned round: late minus early, so that a score below zero means that "
        "the context helps.": (lambda loss, early, late: loss[:, early - 1] - loss[:, late - 1]),
        "You averaged over the prompts: return one score per prompt, the standard error is "
        "computed from them.": (
            lambda loss, early, late: (loss[:, late - 1] - loss[:, early - 1]).mean()
        ),
        "You averaged over all tokens up to `early` and from `late` on: the score compares "
        "the two tokens themselves.": (
            lambda loss, early, late: loss[:, late - 1 :].mean(1) - loss[:, :early].mean(1)
        ),
    },
)


# Exercise 8: zero ablation


def _z_cases() -> dict[str, tuple]:
    z = torch.randn(2, 4, 3, 5, generator=_generator(8))
    return {"head 1 of 3": (z, 1), "head 2 of 3": (z, 2)}


def _with_head(z: Tensor, head: int, value: object) -> Tensor:
    return set_at(z, (ALL, ALL, head), value)


zero_ablation = EXERCISES.add(
    number=8,
    title="zero ablation",
    reference=lambda z, hook, head: _with_head(z, head, 0.0),
    cases=_z_cases,
    run=run_hook,
    mistakes={
        "The activation comes out as it went in: assign to `z[:, :, head]`, or return the "
        "edited copy.": (lambda z, hook, head: z),
        "You zeroed a position instead of a head: heads are the third axis, `z[:, :, head]`.": (
            lambda z, hook, head: set_at(z, (ALL, head), 0.0)
        ),
        "You zeroed a whole prompt instead of a head: heads are the third axis, `z[:, :, head]`.": (
            lambda z, hook, head: set_at(z, (head % 2,), 0.0)
        ),
        "You zeroed one dimension of every head: heads are the third axis, `z[:, :, head]`.": (
            lambda z, hook, head: set_at(z, (..., head), 0.0)
        ),
        "You zeroed every head of the layer; only `head` should go.": (
            lambda z, hook, head: torch.zeros_like(z)
        ),
        "You kept `head` and zeroed all the others: it is the other way round.": (
            lambda z, hook, head: _with_head(torch.zeros_like(z), head, z[:, :, head])
        ),
        "You zeroed the head at the last position only; ablation takes it out everywhere.": (
            lambda z, hook, head: set_at(z, (ALL, -1, head), 0.0)
        ),
        "That is a mean ablation; here the output is set to zero.": (
            lambda z, hook, head: _with_head(z, head, z[:, :, head].mean(0, keepdim=True))
        ),
    },
)


# Exercise 9: mean ablation


def _mean_cases() -> dict[str, tuple]:
    generator = _generator(9)
    z = torch.randn(2, 4, 3, 5, generator=generator)
    reference = 1 + torch.randn(6, 4, 3, 5, generator=generator)
    return {"head 1 of 3, 6 reference prompts": (z, 1, reference)}


mean_ablation = EXERCISES.add(
    number=9,
    title="mean ablation",
    reference=lambda z, hook, head, reference: _with_head(z, head, reference[:, :, head].mean(0)),
    cases=_mean_cases,
    run=run_hook,
    mistakes={
        "The activation comes out as it went in: assign to `z[:, :, head]`, or return the "
        "edited copy.": (lambda z, hook, head, reference: z),
        "That is a zero ablation; here the output becomes its mean over the reference prompts.": (
            lambda z, hook, head, reference: _with_head(z, head, 0.0)
        ),
        "You averaged over the prompts being run; the mean is over the *reference* prompts.": (
            lambda z, hook, head, reference: _with_head(z, head, z[:, :, head].mean(0))
        ),
        "You averaged over the positions too: keep one mean per position, the axis is `dim=0`.": (
            lambda z, hook, head, reference: _with_head(z, head, reference[:, :, head].mean((0, 1)))
        ),
        "You averaged over positions; the mean is over the reference prompts, `dim=0`.": (
            lambda z, hook, head, reference: _with_head(
                z, head, reference[: len(z), :, head].mean(1, keepdim=True)
            )
        ),
        "You averaged over the heads too: use `reference[:, :, head]` alone.": (
            lambda z, hook, head, reference: _with_head(z, head, reference.mean((0, 2)))
        ),
        "You averaged over the dimensions of the head too: the mean is a vector per position.": (
            lambda z, hook, head, reference: _with_head(
                z, head, reference[:, :, head].mean((0, 2))[:, None]
            )
        ),
        "You replaced every head of the layer; only `head` should change.": (
            lambda z, hook, head, reference: reference.mean(0).expand_as(z)
        ),
        "You took a single reference prompt (that is resample ablation): average over all "
        "of them.": (lambda z, hook, head, reference: _with_head(z, head, reference[0, :, head])),
    },
)


# Exercise 10: the normalised effect


def _metric_cases() -> dict[str, tuple]:
    patched = torch.tensor([0.5, 1.0, -2.0, 4.0])
    return {
        "clean 3, corrupted -1": (patched, 3.0, -1.0),
        "clean 2, corrupted 1": (patched, 2.0, 1.0),
    }


normalised_effect = EXERCISES.add(
    number=10,
    title="normalised effect",
    reference=lambda patched, clean, corrupted: (patched - corrupted) / (clean - corrupted),
    cases=_metric_cases,
    mistakes={
        "Clean and corrupted are swapped: a run that is as good as the clean one must give "
        "1, one that is as bad as the corrupted one 0.": (
            lambda patched, clean, corrupted: (patched - clean) / (corrupted - clean)
        ),
        "The sign is turned round: divide by clean minus corrupted.": (
            lambda patched, clean, corrupted: (patched - corrupted) / (corrupted - clean)
        ),
        "Your zero is right, but the clean run does not give 1: divide by the gap between "
        "clean and corrupted.": (lambda patched, clean, corrupted: patched - corrupted),
        "That is a share of the clean figure: the corrupted run does not give 0. Subtract "
        "it above and below the line.": (lambda patched, clean, corrupted: patched / clean),
        "Divide by the gap between clean and corrupted, not by the clean figure: the clean "
        "run must give 1.": (lambda patched, clean, corrupted: (patched - corrupted) / clean),
    },
)


# Exercise 11: patch what a head reads


def _patch_cases() -> dict[str, tuple]:
    generator = _generator(10)
    cases = {}
    for label, width, n_heads, head in (
        ("queries of 6 heads", 6, 6, 4),
        ("2 key heads shared by 6 query heads", 2, 6, 1),
        ("3 key heads shared by 6 query heads", 3, 6, 2),
    ):
        corrupted, clean = torch.randn(2, 2, 4, width, 5, generator=generator).unbind(0)
        cases[label] = (corrupted, clean, head, n_heads)
    return cases


def _with_key(activation: Tensor, clean: Tensor, index: int) -> Tensor:
    """The activation with key/value head `index` taken from `clean`."""
    return _with_head(activation, index, clean[:, :, index])


patch_head_input = EXERCISES.add(
    number=11,
    title="patching queries, keys and values",
    reference=lambda activation, hook, clean, head, n_heads: _with_key(
        activation, clean, head // (n_heads // activation.shape[2])
    ),
    cases=_patch_cases,
    run=run_hook,
    mistakes={
        "The activation comes out as it went in: assign the clean one to the head's slice, "
        "or return the edited copy.": (lambda activation, hook, clean, head, n_heads: activation),
        "You patched every head of the layer; only the one that belongs to `head` should change.": (
            lambda activation, hook, clean, head, n_heads: clean
        ),
        "Right where there are as many key heads as query heads. Where they are shared, "
        "neighbouring query heads use one key/value head: with 3 for 6, heads 0 and 1 use "
        "the first, 2 and 3 the second. Divide `head` by the size of such a group.": (
            lambda activation, hook, clean, head, n_heads: _with_key(activation, clean, head)
        ),
        "You divided by the number of key/value heads; divide by how many query heads share "
        "one, `n_heads // activation.shape[2]`.": (
            lambda activation, hook, clean, head, n_heads: _with_key(
                activation, clean, head // activation.shape[2]
            )
        ),
        "You patched the last position only: patch the head at every position.": (
            lambda activation, hook, clean, head, n_heads: set_at(
                activation,
                (ALL, -1, head // (n_heads // activation.shape[2])),
                clean[:, -1, head // (n_heads // activation.shape[2])],
            )
        ),
        "Clean and corrupted are swapped: the run is the corrupted one, and one head of it "
        "gets the clean activation.": (
            lambda activation, hook, clean, head, n_heads: _with_key(
                clean, activation, head // (n_heads // activation.shape[2])
            )
        ),
    },
)
