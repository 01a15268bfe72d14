"""The exercises of the IOI notebook: right answers, test cases, typical mistakes."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from utils import circuit, metrics
from utils.exercises import Exercises, run_hook, set_at
from utils.heads import Head

EXERCISES = Exercises()
progress = EXERCISES.progress
ALL = slice(None)


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Exercise 1: the logit difference


def _logit_cases() -> dict[str, tuple]:
    logits = torch.randn(3, 4, 9, generator=_generator(1))
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
        "Your signs are turned round: the first column of `answers` is the right name, and "
        "the difference is right minus wrong.": (
            lambda logits, answers: _at(logits, -1, answers.flip(1))
        ),
        "You read the logits at the first position; the answer comes after the last one, "
        "`logits[:, -1]`.": (lambda logits, answers: _at(logits, 0, answers)),
        "You average over the positions; only the last one, `logits[:, -1]`, predicts the "
        "answer.": (
            lambda logits, answers: metrics.logit_diff(logits.mean(1, keepdim=True), answers)
        ),
        "You subtract probabilities; the difference is one of logits, so no softmax.": (
            lambda logits, answers: metrics.logit_diff(logits.softmax(-1), answers)
        ),
        "That is the logit of the right name alone; subtract that of the wrong one.": (
            lambda logits, answers: logits[:, -1].gather(1, answers)[:, 0]
        ),
        "You averaged over the prompts: return one difference per prompt, the standard error "
        "is computed from them.": (
            lambda logits, answers: metrics.logit_diff(logits, answers).mean()
        ),
        "You look up every prompt's names in every prompt; pick each prompt's own pair, with "
        "`gather` or by indexing rows too.": (
            lambda logits, answers: (
                logits[:, -1, answers[:, 0]] - logits[:, -1, answers[:, 1]]  # [prompt prompt]
            )
        ),
    },
)


# Exercise 2: what one head writes to the logit difference


def _attribution_cases() -> dict[str, tuple]:
    generator = _generator(2)
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
        "The scale of the final LayerNorm is missing: divide what the head writes by it, or "
        "the parts do not add up to the logit difference.": (
            lambda z, w_o, scale, direction: _attribution(z, w_o, torch.ones_like(scale), direction)
        ),
        "You multiply by the scale; the final LayerNorm divides by it.": (
            lambda z, w_o, scale, direction: _attribution(z, w_o, 1 / scale, direction)
        ),
        "You average over the dimensions of the stream; a dot product is their sum.": (
            lambda z, w_o, scale, direction: ((z @ w_o) * direction).mean(-1) / scale
        ),
        "You made the direction a unit vector; logits are dot products with the unembedding "
        "itself, so keep its length.": (
            lambda z, w_o, scale, direction: _attribution(
                z, w_o, scale, direction / direction.norm(dim=-1, keepdim=True)
            )
        ),
        "You project every prompt on every prompt's direction; each prompt has its own names, "
        "so multiply row by row and sum over `d_model`.": (
            lambda z, w_o, scale, direction: (z @ w_o / scale[:, None]) @ direction.T
        ),
        "You averaged over the prompts: return one value per prompt.": (
            lambda *args: _attribution(*args).mean()
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
        "The prompts come out as they went in: return the copy that you changed.": (
            lambda tokens, positions: tokens.clone()
        ),
        "You replaced the first mention of the subject; it is the second, `S2`, that says who "
        "is giving.": (
            lambda tokens, positions: _write(
                tokens, positions["S1"], _name(tokens, positions["IO"])
            )
        ),
        "It is the other way round: the name at IO is written over the name at S2, and IO stays.": (
            lambda tokens, positions: _write(
                tokens, positions["IO"], _name(tokens, positions["S2"])
            )
        ),
        "You exchanged the two names; only S2 changes, IO stays.": (
            lambda tokens, positions: _write(
                _write(tokens, positions["S2"], _name(tokens, positions["IO"])),
                positions["IO"],
                _name(tokens, positions["S2"]),
            )
        ),
        "You wrote the *position* of IO over S2; look up the token that stands there.": (
            lambda tokens, positions: _write(tokens, positions["S2"], positions["IO"])
        ),
        "You used the first prompt's positions for all prompts; each prompt has its own (IO "
        "comes first in ABBA, second in BABA).": (
            lambda tokens, positions: set_at(
                tokens, (ALL, positions["S2"][0]), tokens[:, positions["IO"][0]]
            )
        ),
        "`tokens[:, positions]` takes the positions of all prompts in every prompt; index the "
        "rows too, with `torch.arange(len(tokens))`.": (
            lambda tokens, positions: set_at(
                tokens, (ALL, positions["S2"]), tokens[:, positions["IO"]]
            )
        ),
    },
)


# Exercise 4: patch one head


def _patch_head_cases() -> dict[str, tuple]:
    z, clean = torch.randn(2, 2, 4, 3, 5, generator=_generator(4)).unbind(0)
    return {"head 1 of 3": (z, clean, 1), "head 2 of 3": (z, clean, 2)}


def _with_head(z: Tensor, clean: Tensor, head: int) -> Tensor:
    return set_at(z, (ALL, ALL, head), clean[:, :, head])


patch_head = EXERCISES.add(
    number=4,
    title="patch one head",
    reference=lambda z, hook, clean, head: _with_head(z, clean, head),
    cases=_patch_head_cases,
    run=run_hook,
    mistakes={
        "The activation comes out as it went in: assign to `z[:, :, head]`, or return the "
        "edited copy.": (lambda z, hook, clean, head: z),
        "You patched a position instead of a head: heads are the third axis, `z[:, :, head]`.": (
            lambda z, hook, clean, head: set_at(z, (ALL, head), clean[:, head])
        ),
        "You patched one dimension of every head: heads are the third axis, `z[:, :, head]`.": (
            lambda z, hook, clean, head: set_at(z, (..., head), clean[..., head])
        ),
        "You patched every head of the layer; only `head` should change.": (
            lambda z, hook, clean, head: clean
        ),
        "Clean and corrupted are swapped: the run is the corrupted one, and one head of it "
        "gets the clean output.": (lambda z, hook, clean, head: _with_head(clean, z, head)),
        "You patched the last position only: patch the head at every position.": (
            lambda z, hook, clean, head: set_at(z, (ALL, -1, head), clean[:, -1, head])
        ),
    },
)


# Exercise 5: patch by position


def _patch_position_cases() -> dict[str, tuple]:
    resid, clean = torch.randn(2, 3, 6, 5, generator=_generator(5)).unbind(0)
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
        "The activation comes out as it went in: assign to it, or return the edited copy.": (
            lambda resid, hook, clean, positions: resid
        ),
        "`resid[:, positions]` patches the positions of all prompts in every prompt; index the "
        "rows too, with `torch.arange(len(resid))`.": (
            lambda resid, hook, clean, positions: set_at(
                resid, (ALL, positions), clean[:, positions]
            )
        ),
        "You used the first prompt's position for all prompts; each prompt has its own.": (
            lambda resid, hook, clean, positions: set_at(
                resid, (ALL, positions[0]), clean[:, positions[0]]
            )
        ),
        "You patched every position; only each prompt's own should change.": (
            lambda resid, hook, clean, positions: clean
        ),
        "Clean and corrupted are swapped: the run is the corrupted one, and one position of "
        "it gets the clean stream.": (
            lambda resid, hook, clean, positions: _with_positions(clean, resid, positions)
        ),
        "You patched the position after: `positions` counts from 0, as the tensor does.": (
            lambda resid, hook, clean, positions: _with_positions(resid, clean, positions + 1)
        ),
    },
)


# Exercise 6: path patching to the logits


def _path_cases() -> dict[str, tuple]:
    z, original, new = torch.randn(3, 3, 2, 4, 3, 5, generator=_generator(6)).unbind(0)
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
    return _with_head(frozen, new[layer], head) if hook.layer() == layer else frozen.clone()


path_patch_hook = EXERCISES.add(
    number=6,
    title="path patch to the logits",
    reference=_path,
    cases=_path_cases,
    run=_run_all_layers,
    mistakes={
        "The activations come out as they went in: return the frozen layer, with the sender "
        "in it.": (lambda z, hook, original, new, sender: z),
        "That is activation patching: the other heads react to the sender. Freeze them at "
        "their `original` output.": (
            lambda z, hook, original, new, sender: (
                _with_head(z, new[sender.layer], sender.head) if hook.layer() == sender.layer else z
            )
        ),
        "Every head is frozen, the sender too, so nothing changes: in its layer, take the "
        "sender's output from `new`.": (
            lambda z, hook, original, new, sender: original[hook.layer()].clone()
        ),
        "You patched that head number in every layer; the sender is in one layer only, so "
        "compare `hook.layer()` with `sender.layer`.": (
            lambda z, hook, original, new, sender: _with_head(
                original[hook.layer()], new[hook.layer()], sender.head
            )
        ),
        "You took the sender's whole layer from `new`; only `sender.head` should be.": (
            lambda z, hook, original, new, sender: (
                new[hook.layer()] if hook.layer() == sender.layer else original[hook.layer()]
            ).clone()
        ),
        "In the sender's own layer the other heads are not frozen: start from `original` "
        "there too.": (
            lambda z, hook, original, new, sender: (
                _with_head(z, new[sender.layer], sender.head)
                if hook.layer() == sender.layer
                else original[hook.layer()].clone()
            )
        ),
        "You froze the sender's layer only; the heads of every other layer are frozen too.": (
            lambda z, hook, original, new, sender: (
                _path(z, hook, original, new, sender) if hook.layer() == sender.layer else z
            )
        ),
        "`original` and `new` are swapped: all heads as in the original run, the sender as "
        "in the new one.": (
            lambda z, hook, original, new, sender: _path(z, hook, new, original, sender)
        ),
    },
)


# Exercise 7: the copying score


def _copying_cases() -> dict[str, tuple]:
    cases = {}
    for seed, k in ((7, 3), (8, 5)):
        generator = _generator(seed)
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
        "You ask for the largest logit; the name may be anywhere among the `k` largest.": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(_ov(resid, w_v, w_o, w_u), names, 1).mean()
        ),
        "You look among the k smallest logits; that is the score of a negative name mover.": (
            lambda resid, w_v, w_o, w_u, names, k: (
                _hits(-_ov(resid, w_v, w_o, w_u), names, k).sum(-1).mean()
            )
        ),
        "You unembed the residual stream itself; it must go through the head first, `w_v` and "
        "then `w_o`.": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(resid @ w_u, names, k).sum(-1).mean()
        ),
        "You count a row when *any* name is among its k largest logits; it must be the name "
        "of that row.": (
            lambda resid, w_v, w_o, w_u, names, k: (
                torch.isin(_ov(resid, w_v, w_o, w_u).topk(k).indices, names).any(-1).float().mean()
            )
        ),
        "You divided by k as well: at most one of the k can be the name, so ask whether any "
        "of them is, then average over the names.": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(_ov(resid, w_v, w_o, w_u), names, k).mean()
        ),
        "That is how many names are copied; return their share, between 0 and 1.": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(_ov(resid, w_v, w_o, w_u), names, k).sum()
        ),
        "You return one entry per name; average them into one number.": (
            lambda resid, w_v, w_o, w_u, names, k: _hits(_ov(resid, w_v, w_o, w_u), names, k).sum(
                -1
            )
        ),
    },
)


# Exercise 8: mean ablation of all but the circuit


def _ablation_cases() -> dict[str, tuple]:
    generator = _generator(9)
    z, means = torch.randn(2, 3, 4, 3, 5, generator=generator).unbind(0)
    return {"3 prompts": (z, means, torch.rand(3, 4, 3, generator=generator) < 0.4)}


mean_ablation = EXERCISES.add(
    number=8,
    title="mean ablation over ABC",
    reference=lambda z, hook, means, keep: torch.where(keep[..., None], z, means),
    cases=_ablation_cases,
    run=run_hook,
    mistakes={
        "The activation comes out as it went in: assign to it, or return the edited copy.": (
            lambda z, hook, means, keep: z
        ),
        "It is the other way round: where `keep` is True the output stays, elsewhere it "
        "becomes its mean.": (lambda z, hook, means, keep: torch.where(keep[..., None], means, z)),
        "That is a zero ablation; put the means in place of what is not kept.": (
            lambda z, hook, means, keep: z * keep[..., None]
        ),
        "You replaced every head everywhere; what `keep` marks stays.": (
            lambda z, hook, means, keep: means
        ),
        "You averaged `means` over the prompts: each prompt already has the mean of its own "
        "template there.": (
            lambda z, hook, means, keep: torch.where(keep[..., None], z, means.mean(0))
        ),
        "You averaged over the prompts being run; the means over the ABC prompts are given.": (
            lambda z, hook, means, keep: torch.where(keep[..., None], z, z.mean(0))
        ),
        "You kept what is kept in *any* prompt; `keep` has a row for each prompt, because the "
        "positions differ.": (
            lambda z, hook, means, keep: torch.where(keep.any(0)[..., None], z, means)
        ),
        "You kept heads at all positions; they stay only at the positions that `keep` marks.": (
            lambda z, hook, means, keep: torch.where(keep.any(1, keepdim=True)[..., None], z, means)
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
    reference=lambda f_circuit, f_model: circuit.faithfulness(f_circuit, f_model).ratio.mean,
    cases=_faithfulness_cases,
    mistakes={
        "That is the mean of the ratios, in which a prompt with a small difference counts "
        "most; take the ratio of the means.": (lambda circuit, model: (circuit / model).mean()),
        "It is upside down: what the circuit gives, over what the model gives.": (
            lambda circuit, model: model.mean() / circuit.mean()
        ),
        "That is the paper's distance |F(M) - F(C)|, in logits; here we want the share, "
        "F(C) over F(M).": (lambda circuit, model: model.mean() - circuit.mean()),
        "That is the share that is lost; return the share that the circuit keeps.": (
            lambda circuit, model: 1 - circuit.mean() / model.mean()
        ),
        "That is a difference, in logits; return the ratio F(C) over F(M).": (
            lambda circuit, model: circuit.mean() - model.mean()
        ),
        "You return a ratio per prompt; take the mean of each over the prompts, then their "
        "ratio.": (lambda circuit, model: circuit / model),
    },
)
