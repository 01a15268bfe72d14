"""Exercises 1 to 5 of the IOI notebook: right answers, test cases, typical mistakes."""

from __future__ import annotations

import torch
from torch import Tensor

from utils import metrics
from utils.exercises import Exercises, run_hook, set_at

EXERCISES = Exercises()
progress = EXERCISES.progress
ALL = slice(None)


def generator_of(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Exercise 1: the logit difference


def _logit_cases() -> dict[str, tuple]:
    logits = torch.randn(3, 4, 9, generator=generator_of(1))
    return {"3 prompts of 4 tokens": (logits, torch.tensor([[2, 5], [7, 0], [8, 3]]))}


def _at(logits: Tensor, position: int, answers: Tensor) -> Tensor:
    """Logit of right minus logit of wrong at a position."""
    return metrics.logit_diff(logits[:, position][:, None], answers)


logit_difference = EXERCISES.add(
    number=1,
    title="logit difference",
    reference=metrics.logit_diff,
    cases=_logit_cases,
    mistakes={
        "sign": (
            lambda logits, answers: _at(logits, -1, answers.flip(1)),
            "Your signs are turned round: the first column of `answers` is the right name, and "
            "the difference is right minus wrong.",
        ),
        "first position": (
            lambda logits, answers: _at(logits, 0, answers),
            "You read the logits at the first position; the answer comes after the last one, "
            "`logits[:, -1]`.",
        ),
        "all positions": (
            lambda logits, answers: metrics.logit_diff(logits.mean(1, keepdim=True), answers),
            "You average over the positions; only the last one, `logits[:, -1]`, predicts the "
            "answer.",
        ),
        "probabilities": (
            lambda logits, answers: metrics.logit_diff(logits.softmax(-1), answers),
            "You subtract probabilities; the difference is one of logits, so no softmax.",
        ),
        "right answer only": (
            lambda logits, answers: logits[:, -1].gather(1, answers)[:, 0],
            "That is the logit of the right name alone; subtract that of the wrong one.",
        ),
        "mean over prompts": (
            lambda logits, answers: metrics.logit_diff(logits, answers).mean(),
            "You averaged over the prompts: return one difference per prompt, the standard error "
            "is computed from them.",
        ),
        "every prompt's answers": (
            lambda logits, answers: (
                logits[:, -1, answers[:, 0]] - logits[:, -1, answers[:, 1]]  # [prompt prompt]
            ),
            "You look up every prompt's names in every prompt; pick each prompt's own pair, with "
            "`gather` or by indexing rows too.",
        ),
    },
)


# Exercise 2: what one head writes to the logit difference


def _attribution_cases() -> dict[str, tuple]:
    generator = generator_of(2)
    z, w_o = torch.randn(3, 4, generator=generator), torch.randn(4, 6, generator=generator)
    scale = 1.5 + torch.rand(3, generator=generator)
    return {"3 prompts": (z, w_o, scale, torch.randn(3, 6, generator=generator))}


def _attribution(z: Tensor, w_o: Tensor, scale: Tensor, direction: Tensor) -> Tensor:
    return ((z @ w_o) * direction).sum(-1) / scale


direct_attribution = EXERCISES.add(
    number=2,
    title="one head's direct attribution",
    reference=_attribution,
    cases=_attribution_cases,
    mistakes={
        "no scale": (
            lambda z, w_o, scale, direction: _attribution(
                z, w_o, torch.ones_like(scale), direction
            ),
            "The scale of the final LayerNorm is missing: divide what the head writes by it, or "
            "the parts do not add up to the logit difference.",
        ),
        "times scale": (
            lambda z, w_o, scale, direction: _attribution(z, w_o, 1 / scale, direction),
            "You multiply by the scale; the final LayerNorm divides by it.",
        ),
        "mean over d_model": (
            lambda z, w_o, scale, direction: ((z @ w_o) * direction).mean(-1) / scale,
            "You average over the dimensions of the stream; a dot product is their sum.",
        ),
        "unit direction": (
            lambda z, w_o, scale, direction: _attribution(
                z, w_o, scale, direction / direction.norm(dim=-1, keepdim=True)
            ),
            "You made the direction a unit vector; logits are dot products with the unembedding "
            "itself, so keep its length.",
        ),
        "every prompt's direction": (
            lambda z, w_o, scale, direction: (z @ w_o / scale[:, None]) @ direction.T,
            "You project every prompt on every prompt's direction; each prompt has its own names, "
            "so multiply row by row and sum over `d_model`.",
        ),
        "mean over prompts": (
            lambda *args: _attribution(*args).mean(),
            "You averaged over the prompts: return one value per prompt.",
        ),
    },
)


# Exercise 3: corrupted prompts


def _s2_cases() -> dict[str, tuple]:
    tokens = torch.arange(10, 34).reshape(3, 8)
    positions = {
        "IO": torch.tensor([1, 3, 2]),
        "S1": torch.tensor([3, 1, 4]),
        "S2": torch.tensor([5, 7, 6]),
    }
    rows = torch.arange(3)
    tokens[rows, positions["S2"]] = tokens[rows, positions["S1"]]
    return {"3 prompts of 8 tokens": (tokens, positions)}


def _write(tokens: Tensor, at: Tensor, names: Tensor) -> Tensor:
    """The tokens with each prompt's entry `at` replaced by its entry of `names`."""
    return set_at(tokens, (torch.arange(len(tokens)), at), names)


def _name(tokens: Tensor, at: Tensor) -> Tensor:
    return tokens[torch.arange(len(tokens)), at]


corrupt_s2 = EXERCISES.add(
    number=3,
    title="corrupted prompts",
    reference=lambda tokens, positions: _write(
        tokens, positions["S2"], _name(tokens, positions["IO"])
    ),
    cases=_s2_cases,
    mistakes={
        "nothing": (
            lambda tokens, positions: tokens.clone(),
            "The prompts come out as they went in: return the copy that you changed.",
        ),
        "S1": (
            lambda tokens, positions: _write(
                tokens, positions["S1"], _name(tokens, positions["IO"])
            ),
            "You replaced the first mention of the subject; it is the second, `S2`, that says who "
            "is giving.",
        ),
        "IO": (
            lambda tokens, positions: _write(
                tokens, positions["IO"], _name(tokens, positions["S2"])
            ),
            "It is the other way round: the name at IO is written over the name at S2, and IO "
            "stays.",
        ),
        "exchanged": (
            lambda tokens, positions: _write(
                _write(tokens, positions["S2"], _name(tokens, positions["IO"])),
                positions["IO"],
                _name(tokens, positions["S2"]),
            ),
            "You exchanged the two names; only S2 changes, IO stays.",
        ),
        "position as token": (
            lambda tokens, positions: _write(tokens, positions["S2"], positions["IO"]),
            "You wrote the *position* of IO over S2; look up the token that stands there.",
        ),
        "first prompt's positions": (
            lambda tokens, positions: set_at(
                tokens, (ALL, positions["S2"][0]), tokens[:, positions["IO"][0]]
            ),
            "You used the first prompt's positions for all prompts; each prompt has its own (IO "
            "comes first in ABBA, second in BABA).",
        ),
        "all prompts' positions": (
            lambda tokens, positions: set_at(
                tokens, (ALL, positions["S2"]), tokens[:, positions["IO"]]
            ),
            "`tokens[:, positions]` takes the positions of all prompts in every prompt; index the "
            "rows too, with `torch.arange(len(tokens))`.",
        ),
    },
)


# Exercise 4: patch one head


def _patch_head_cases() -> dict[str, tuple]:
    z, clean = torch.randn(2, 2, 4, 3, 5, generator=generator_of(4)).unbind(0)
    return {"head 1 of 3": (z, clean, 1), "head 2 of 3": (z, clean, 2)}


def with_head(z: Tensor, clean: Tensor, head: int) -> Tensor:
    return set_at(z, (ALL, ALL, head), clean[:, :, head])


patch_head = EXERCISES.add(
    number=4,
    title="patch one head",
    reference=lambda z, hook, clean, head: with_head(z, clean, head),
    cases=_patch_head_cases,
    run=run_hook,
    mistakes={
        "nothing": (
            lambda z, hook, clean, head: z,
            "The activation comes out as it went in: assign to `z[:, :, head]`, or return the "
            "edited copy.",
        ),
        "position": (
            lambda z, hook, clean, head: set_at(z, (ALL, head), clean[:, head]),
            "You patched a position instead of a head: heads are the third axis, `z[:, :, head]`.",
        ),
        "dimension": (
            lambda z, hook, clean, head: set_at(z, (..., head), clean[..., head]),
            "You patched one dimension of every head: heads are the third axis, `z[:, :, head]`.",
        ),
        "all heads": (
            lambda z, hook, clean, head: clean,
            "You patched every head of the layer; only `head` should change.",
        ),
        "swapped": (
            lambda z, hook, clean, head: with_head(clean, z, head),
            "Clean and corrupted are swapped: the run is the corrupted one, and one head of it "
            "gets the clean output.",
        ),
        "last position": (
            lambda z, hook, clean, head: set_at(z, (ALL, -1, head), clean[:, -1, head]),
            "You patched the last position only: patch the head at every position.",
        ),
    },
)


# Exercise 5: patch by position


def _patch_position_cases() -> dict[str, tuple]:
    resid, clean = torch.randn(2, 3, 6, 5, generator=generator_of(5)).unbind(0)
    return {"3 prompts of 6 tokens": (resid, clean, torch.tensor([1, 4, 2]))}


def _with_positions(resid: Tensor, clean: Tensor, positions: Tensor) -> Tensor:
    index = (torch.arange(len(resid)), positions)
    return set_at(resid, index, clean[index])


patch_position = EXERCISES.add(
    number=5,
    title="patch by position",
    reference=lambda resid, hook, clean, positions: _with_positions(resid, clean, positions),
    cases=_patch_position_cases,
    run=run_hook,
    mistakes={
        "nothing": (
            lambda resid, hook, clean, positions: resid,
            "The activation comes out as it went in: assign to it, or return the edited copy.",
        ),
        "all prompts' positions": (
            lambda resid, hook, clean, positions: set_at(
                resid, (ALL, positions), clean[:, positions]
            ),
            "`resid[:, positions]` patches the positions of all prompts in every prompt; index the "
            "rows too, with `torch.arange(len(resid))`.",
        ),
        "first prompt's position": (
            lambda resid, hook, clean, positions: set_at(
                resid, (ALL, positions[0]), clean[:, positions[0]]
            ),
            "You used the first prompt's position for all prompts; each prompt has its own.",
        ),
        "everything": (
            lambda resid, hook, clean, positions: clean,
            "You patched every position; only each prompt's own should change.",
        ),
        "swapped": (
            lambda resid, hook, clean, positions: _with_positions(clean, resid, positions),
            "Clean and corrupted are swapped: the run is the corrupted one, and one position of "
            "it gets the clean stream.",
        ),
        "one late": (
            lambda resid, hook, clean, positions: _with_positions(resid, clean, positions + 1),
            "You patched the position after: `positions` counts from 0, as the tensor does.",
        ),
    },
)
