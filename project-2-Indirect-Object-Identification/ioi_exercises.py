"""The exercises of the IOI notebook: right answers, test cases, typical mistakes.

Those up to activation patching are in `checks_ioi_basics`, path patching and after below.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from ioi_basic_exercises import (
    EXERCISES,
    corrupt_s2,
    direct_attribution,
    generator_of,
    logit_difference,
    patch_head,
    patch_position,
    progress,
    with_head,
)
from utils.exercises import run_hook
from utils.heads import Head

__all__ = [
    "EXERCISES",
    "copying_score",
    "corrupt_s2",
    "direct_attribution",
    "faithfulness",
    "logit_difference",
    "mean_ablation",
    "patch_head",
    "patch_position",
    "path_patch_hook",
    "progress",
]


# Exercise 6: path patching to the logits


def _path_cases() -> dict[str, tuple]:
    z, original, new = torch.randn(3, 3, 2, 4, 3, 5, generator=generator_of(6)).unbind(0)
    return {"sender L1H2": (z, original, new, Head(1, 2)), "L0H1": (z, original, new, Head(0, 1))}


def _run_all_layers(answer: Callable, z: Tensor, *args: object) -> Tensor:
    """What the hook makes of every layer, [layer prompt pos head d_head]."""
    edited = []
    for layer, activation in enumerate(z):
        hook = HookPoint()
        hook.name = f"blocks.{layer}.attn.hook_z"
        activation = activation.clone()
        returned = answer(activation, hook, *args)
        edited.append(activation if returned is None else returned)
    return torch.stack(edited)


def _path(z: Tensor, hook: HookPoint, original: Tensor, new: Tensor, sender: Head) -> Tensor:
    layer, head = sender
    frozen = original[hook.layer()]
    return with_head(frozen, new[layer], head) if hook.layer() == layer else frozen.clone()


path_patch_hook = EXERCISES.add(
    number=6,
    title="path patch to the logits",
    reference=_path,
    cases=_path_cases,
    run=_run_all_layers,
    mistakes={
        "nothing": (
            lambda z, hook, original, new, sender: z,
            "The activations come out as they went in: return the frozen layer, with the sender "
            "in it.",
        ),
        "not frozen": (
            lambda z, hook, original, new, sender: (
                with_head(z, new[sender.layer], sender.head) if hook.layer() == sender.layer else z
            ),
            "That is activation patching: the other heads react to the sender. Freeze them at "
            "their `original` output.",
        ),
        "sender frozen too": (
            lambda z, hook, original, new, sender: original[hook.layer()].clone(),
            "Every head is frozen, the sender too, so nothing changes: in its layer, take the "
            "sender's output from `new`.",
        ),
        "every layer": (
            lambda z, hook, original, new, sender: with_head(
                original[hook.layer()], new[hook.layer()], sender.head
            ),
            "You patched that head number in every layer; the sender is in one layer only, so "
            "compare `hook.layer()` with `sender.layer`.",
        ),
        "whole layer": (
            lambda z, hook, original, new, sender: (
                new[hook.layer()] if hook.layer() == sender.layer else original[hook.layer()]
            ).clone(),
            "You took the sender's whole layer from `new`; only `sender.head` should be.",
        ),
        "sender's layer not frozen": (
            lambda z, hook, original, new, sender: (
                with_head(z, new[sender.layer], sender.head)
                if hook.layer() == sender.layer
                else original[hook.layer()].clone()
            ),
            "In the sender's own layer the other heads are not frozen: start from `original` "
            "there too.",
        ),
        "only the sender's layer frozen": (
            lambda z, hook, original, new, sender: (
                _path(z, hook, original, new, sender) if hook.layer() == sender.layer else z
            ),
            "You froze the sender's layer only; the heads of every other layer are frozen too.",
        ),
        "swapped": (
            lambda z, hook, original, new, sender: _path(z, hook, new, original, sender),
            "`original` and `new` are swapped: all heads as in the original run, the sender as "
            "in the new one.",
        ),
    },
)


# Exercise 7: the copying score


def _copying_cases() -> dict[str, tuple]:
    cases = {}
    for seed, k in ((7, 3), (8, 5)):
        generator = generator_of(seed)
        names = torch.randperm(30, generator=generator)[:12]
        w_u = torch.randn(8, 30, generator=generator)
        resid = w_u[:, names].T + 0.5 * torch.randn(12, 8, generator=generator)
        w_v = torch.randn(8, 4, generator=generator)
        # half of a copying circuit, half noise: some names are copied and some are not
        w_o = w_v.T + torch.randn(4, 8, generator=generator)
        cases[f"12 names, k = {k}"] = (resid, w_v, w_o, w_u, names, k)
    return cases


def _hits(logits: Tensor, names: Tensor, k: int) -> Tensor:
    """Which of the k largest logits are the name's own, [name k]."""
    return (logits.topk(k).indices == names[:, None]).float()


def _ov(resid: Tensor, w_v: Tensor, w_o: Tensor, w_u: Tensor) -> Tensor:
    return resid @ w_v @ w_o @ w_u


copying_score = EXERCISES.add(
    number=7,
    title="copying score",
    reference=lambda resid, w_v, w_o, w_u, names, k: (
        _hits(_ov(resid, w_v, w_o, w_u), names, k).any(-1).float().mean().item()
    ),
    cases=_copying_cases,
    mistakes={
        "top 1": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(
                _ov(resid, w_v, w_o, w_u), names, 1
            ).mean(),
            "You ask for the largest logit; the name may be anywhere among the `k` largest.",
        ),
        "smallest": (
            lambda resid, w_v, w_o, w_u, names, k: (
                _hits(-_ov(resid, w_v, w_o, w_u), names, k).sum(-1).mean()
            ),
            "You look among the k smallest logits; that is the score of a negative name mover.",
        ),
        "no head": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(resid @ w_u, names, k).sum(-1).mean(),
            "You unembed the residual stream itself; it must go through the head first, `w_v` and "
            "then `w_o`.",
        ),
        "any name": (
            lambda resid, w_v, w_o, w_u, names, k: (
                torch.isin(_ov(resid, w_v, w_o, w_u).topk(k).indices, names).any(-1).float().mean()
            ),
            "You count a row when *any* name is among its k largest logits; it must be the name "
            "of that row.",
        ),
        "share of the k": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(
                _ov(resid, w_v, w_o, w_u), names, k
            ).mean(),
            "You divided by k as well: at most one of the k can be the name, so ask whether any "
            "of them is, then average over the names.",
        ),
        "count": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(_ov(resid, w_v, w_o, w_u), names, k).sum(),
            "That is how many names are copied; return their share, between 0 and 1.",
        ),
        "per name": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(_ov(resid, w_v, w_o, w_u), names, k).sum(
                -1
            ),
            "You return one entry per name; average them into one number.",
        ),
    },
)


# Exercise 8: mean ablation of all but the circuit


def _ablation_cases() -> dict[str, tuple]:
    generator = generator_of(9)
    z, means = torch.randn(2, 3, 4, 3, 5, generator=generator).unbind(0)
    return {"3 prompts": (z, means, torch.rand(3, 4, 3, generator=generator) < 0.4)}


mean_ablation = EXERCISES.add(
    number=8,
    title="mean ablation over ABC",
    reference=lambda z, hook, means, keep: torch.where(keep[..., None], z, means),
    cases=_ablation_cases,
    run=run_hook,
    mistakes={
        "nothing": (
            lambda z, hook, means, keep: z,
            "The activation comes out as it went in: assign to it, or return the edited copy.",
        ),
        "inverted": (
            lambda z, hook, means, keep: torch.where(keep[..., None], means, z),
            "It is the other way round: where `keep` is True the output stays, elsewhere it "
            "becomes its mean.",
        ),
        "zero": (
            lambda z, hook, means, keep: z * keep[..., None],
            "That is a zero ablation; put the means in place of what is not kept.",
        ),
        "everything": (
            lambda z, hook, means, keep: means,
            "You replaced every head everywhere; what `keep` marks stays.",
        ),
        "mean over prompts": (
            lambda z, hook, means, keep: torch.where(keep[..., None], z, means.mean(0)),
            "You averaged `means` over the prompts: each prompt already has the mean of its own "
            "template there.",
        ),
        "own mean": (
            lambda z, hook, means, keep: torch.where(keep[..., None], z, z.mean(0)),
            "You averaged over the prompts being run; the means over the ABC prompts are given.",
        ),
        "kept anywhere": (
            lambda z, hook, means, keep: torch.where(keep.any(0)[..., None], z, means),
            "You kept what is kept in *any* prompt; `keep` has a row for each prompt, because the "
            "positions differ.",
        ),
        "whole heads": (
            lambda z, hook, means, keep: torch.where(
                keep.any(1, keepdim=True)[..., None], z, means
            ),
            "You kept heads at all positions; they stay only at the positions that `keep` marks.",
        ),
    },
)


# Exercise 9: faithfulness


def _faithfulness_cases() -> dict[str, tuple]:
    circuit = torch.tensor([1.0, 3.5, 2.0, 4.0])
    model = torch.tensor([2.0, 4.0, 1.5, 5.0])
    return {"4 prompts": (circuit, model), "4 others": (circuit.flip(0), 1 + model)}


faithfulness = EXERCISES.add(
    number=9,
    title="faithfulness",
    reference=lambda circuit, model: (circuit.mean() / model.mean()).item(),
    cases=_faithfulness_cases,
    mistakes={
        "mean of ratios": (
            lambda circuit, model: (circuit / model).mean(),
            "That is the mean of the ratios, in which a prompt with a small difference counts "
            "most; take the ratio of the means.",
        ),
        "inverse": (
            lambda circuit, model: model.mean() / circuit.mean(),
            "It is upside down: what the circuit gives, over what the model gives.",
        ),
        "difference": (
            lambda circuit, model: model.mean() - circuit.mean(),
            "That is the paper's distance |F(M) - F(C)|, in logits; here we want the share, "
            "F(C) over F(M).",
        ),
        "lost share": (
            lambda circuit, model: 1 - circuit.mean() / model.mean(),
            "That is the share that is lost; return the share that the circuit keeps.",
        ),
        "negative difference": (
            lambda circuit, model: circuit.mean() - model.mean(),
            "That is a difference, in logits; return the ratio F(C) over F(M).",
        ),
        "per prompt": (
            lambda circuit, model: circuit / model,
            "You return a ratio per prompt; take the mean of each over the prompts, then their "
            "ratio.",
        ),
    },
)
