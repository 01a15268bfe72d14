"""The exercises of the induction-heads notebook: right answers, test cases, typical mistakes.

Those of part A are in `checks_toy`, those of part B below.
"""

from __future__ import annotations

import torch
from torch import Tensor

from toy_exercises import (
    EXERCISES,
    composition_score,
    eigenvalue_copying,
    induction_score,
    per_token_loss,
    previous_token_score,
    progress,
    sharpest_drop,
)
from utils.exercises import run_hook, set_at

__all__ = [
    "EXERCISES",
    "composition_score",
    "eigenvalue_copying",
    "icl_score",
    "induction_score",
    "mean_ablation",
    "normalised_effect",
    "patch_head_input",
    "per_token_loss",
    "previous_token_score",
    "progress",
    "sharpest_drop",
    "zero_ablation",
]


def _loss_cases() -> dict[str, tuple]:
    loss = torch.rand(3, 40, generator=torch.Generator().manual_seed(7))
    return {"3 prompts of 41 tokens": (loss, 5, 35)}


icl_score = EXERCISES.add(
    number=7,
    title="in-context-learning score",
    reference=lambda loss, early, late: loss[:, late - 1] - loss[:, early - 1],
    cases=_loss_cases,
    mistakes={
        "off by one": (
            lambda loss, early, late: loss[:, late] - loss[:, early],
            "You are one token late: column 0 of `loss` is about token 1, so token `late` is in "
            "column `late - 1`.",
        ),
        "sign": (
            lambda loss, early, late: loss[:, early - 1] - loss[:, late - 1],
            "The sign is turned round: late minus early, so that a score below zero means that "
            "the context helps.",
        ),
        "mean over prompts": (
            lambda loss, early, late: (loss[:, late - 1] - loss[:, early - 1]).mean(),
            "You averaged over the prompts: return one score per prompt, the standard error is "
            "computed from them.",
        ),
        "means over halves": (
            lambda loss, early, late: loss[:, late - 1 :].mean(1) - loss[:, :early].mean(1),
            "You averaged over all tokens up to `early` and from `late` on: the score compares "
            "the two tokens themselves.",
        ),
    },
)


def _z_cases() -> dict[str, tuple]:
    z = torch.randn(2, 4, 3, 5, generator=torch.Generator().manual_seed(8))
    return {"head 1 of 3": (z, 1), "head 2 of 3": (z, 2)}


ALL = slice(None)

zero_ablation = EXERCISES.add(
    number=8,
    title="zero ablation",
    reference=lambda z, hook, head: set_at(z, (ALL, ALL, head), 0.0),
    cases=_z_cases,
    run=run_hook,
    mistakes={
        "nothing": (
            lambda z, hook, head: z,
            "The activation comes out as it went in: assign to `z[:, :, head]`, or return the "
            "edited copy.",
        ),
        "position": (
            lambda z, hook, head: set_at(z, (ALL, head), 0.0),
            "You zeroed a position instead of a head: heads are the third axis, `z[:, :, head]`.",
        ),
        "prompt": (
            lambda z, hook, head: set_at(z, (head % 2,), 0.0),
            "You zeroed a whole prompt instead of a head: heads are the third axis, "
            "`z[:, :, head]`.",
        ),
        "dimension": (
            lambda z, hook, head: set_at(z, (..., head), 0.0),
            "You zeroed one dimension of every head: heads are the third axis, `z[:, :, head]`.",
        ),
        "all heads": (
            lambda z, hook, head: torch.zeros_like(z),
            "You zeroed every head of the layer; only `head` should go.",
        ),
        "other heads": (
            lambda z, hook, head: set_at(torch.zeros_like(z), (ALL, ALL, head), z[:, :, head]),
            "You kept `head` and zeroed all the others: it is the other way round.",
        ),
        "last position": (
            lambda z, hook, head: set_at(z, (ALL, -1, head), 0.0),
            "You zeroed the head at the last position only; ablation takes it out everywhere.",
        ),
        "mean": (
            lambda z, hook, head: set_at(z, (ALL, ALL, head), z[:, :, head].mean(0, keepdim=True)),
            "That is a mean ablation; here the output is set to zero.",
        ),
    },
)


def _mean_cases() -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(9)
    z = torch.randn(2, 4, 3, 5, generator=generator)
    reference = 1 + torch.randn(6, 4, 3, 5, generator=generator)
    return {"head 1 of 3, 6 reference prompts": (z, 1, reference)}


def _with_head(z: Tensor, head: int, value: object) -> Tensor:
    return set_at(z, (ALL, ALL, head), value)


mean_ablation = EXERCISES.add(
    number=9,
    title="mean ablation",
    reference=lambda z, hook, head, reference: _with_head(z, head, reference[:, :, head].mean(0)),
    cases=_mean_cases,
    run=run_hook,
    mistakes={
        "nothing": (
            lambda z, hook, head, reference: z,
            "The activation comes out as it went in: assign to `z[:, :, head]`, or return the "
            "edited copy.",
        ),
        "zero": (
            lambda z, hook, head, reference: _with_head(z, head, 0.0),
            "That is a zero ablation; here the output becomes its mean over the reference prompts.",
        ),
        "own mean": (
            lambda z, hook, head, reference: _with_head(z, head, z[:, :, head].mean(0)),
            "You averaged over the prompts being run; the mean is over the *reference* prompts.",
        ),
        "mean over positions": (
            lambda z, hook, head, reference: _with_head(
                z, head, reference[:, :, head].mean((0, 1))
            ),
            "You averaged over the positions too: keep one mean per position, the axis is `dim=0`.",
        ),
        "mean over positions only": (
            lambda z, hook, head, reference: _with_head(
                z, head, reference[: len(z), :, head].mean(1, keepdim=True)
            ),
            "You averaged over positions; the mean is over the reference prompts, `dim=0`.",
        ),
        "mean over heads": (
            lambda z, hook, head, reference: _with_head(z, head, reference.mean((0, 2))),
            "You averaged over the heads too: use `reference[:, :, head]` alone.",
        ),
        "mean over dimensions": (
            lambda z, hook, head, reference: _with_head(
                z, head, reference[:, :, head].mean((0, 2))[:, None]
            ),
            "You averaged over the dimensions of the head too: the mean is a vector per position.",
        ),
        "all heads": (
            lambda z, hook, head, reference: reference.mean(0).expand_as(z),
            "You replaced every head of the layer; only `head` should change.",
        ),
        "first reference": (
            lambda z, hook, head, reference: _with_head(z, head, reference[0, :, head]),
            "You took a single reference prompt (that is resample ablation): average over all "
            "of them.",
        ),
    },
)


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
        "swapped": (
            lambda patched, clean, corrupted: (patched - clean) / (corrupted - clean),
            "Clean and corrupted are swapped: a run that is as good as the clean one must give "
            "1, one that is as bad as the corrupted one 0.",
        ),
        "sign": (
            lambda patched, clean, corrupted: (patched - corrupted) / (corrupted - clean),
            "The sign is turned round: divide by clean minus corrupted.",
        ),
        "not divided": (
            lambda patched, clean, corrupted: patched - corrupted,
            "Your zero is right, but the clean run does not give 1: divide by the gap between "
            "clean and corrupted.",
        ),
        "share of clean": (
            lambda patched, clean, corrupted: patched / clean,
            "That is a share of the clean figure: the corrupted run does not give 0. Subtract "
            "it above and below the line.",
        ),
        "divided by clean": (
            lambda patched, clean, corrupted: (patched - corrupted) / clean,
            "Divide by the gap between clean and corrupted, not by the clean figure: the clean "
            "run must give 1.",
        ),
    },
)


def _patch_cases() -> dict[str, tuple]:
    generator = torch.Generator().manual_seed(10)
    cases = {}
    for label, width, n_heads, head in (
        ("queries of 6 heads", 6, 6, 4),
        ("2 key heads shared by 6 query heads", 2, 6, 1),
        ("3 key heads shared by 6 query heads", 3, 6, 2),
    ):
        corrupted, clean = torch.randn(2, 2, 4, width, 5, generator=generator).unbind(0)
        cases[label] = (corrupted, clean, head, n_heads)
    return cases


def _patched(activation: Tensor, clean: Tensor, index: int) -> Tensor:
    return set_at(activation, (ALL, ALL, index), clean[:, :, index])


patch_head_input = EXERCISES.add(
    number=11,
    title="patching queries, keys and values",
    reference=lambda activation, hook, clean, head, n_heads: _patched(
        activation, clean, head // (n_heads // activation.shape[2])
    ),
    cases=_patch_cases,
    run=run_hook,
    mistakes={
        "nothing": (
            lambda activation, hook, clean, head, n_heads: activation,
            "The activation comes out as it went in: assign the clean one to the head's slice, "
            "or return the edited copy.",
        ),
        "everything": (
            lambda activation, hook, clean, head, n_heads: clean,
            "You patched every head of the layer; only the one that belongs to `head` should "
            "change.",
        ),
        "query head's index": (
            lambda activation, hook, clean, head, n_heads: _patched(activation, clean, head),
            "Right where there are as many key heads as query heads. Where they are shared, "
            "neighbouring query heads use one key/value head: with 3 for 6, heads 0 and 1 use "
            "the first, 2 and 3 the second. Divide `head` by the size of such a group.",
        ),
        "group size": (
            lambda activation, hook, clean, head, n_heads: _patched(
                activation, clean, head // activation.shape[2]
            ),
            "You divided by the number of key/value heads; divide by how many query heads share "
            "one, `n_heads // activation.shape[2]`.",
        ),
        "last position": (
            lambda activation, hook, clean, head, n_heads: set_at(
                activation,
                (ALL, -1, head // (n_heads // activation.shape[2])),
                clean[:, -1, head // (n_heads // activation.shape[2])],
            ),
            "You patched the last position only: patch the head at every position.",
        ),
        "corrupted": (
            lambda activation, hook, clean, head, n_heads: _patched(
                clean, activation, head // (n_heads // activation.shape[2])
            ),
            "Clean and corrupted are swapped: the run is the corrupted one, and one head of it "
            "gets the clean activation.",
        ),
    },
)
