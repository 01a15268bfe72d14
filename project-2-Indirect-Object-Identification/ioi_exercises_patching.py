"""Exercises of the IOI notebook, parts 1 to 3; `ioi_exercises` has the others."""

from functools import partial

import ioi_experiments as ways
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from utils import metrics
from utils.exercises import Exercises, hook_point, run_hook, set_at

EXERCISES = Exercises()
ALL = slice(None)


# Exercise 1: the logit difference


def logit_difference_answer(
    logits: Float[Tensor, "prompt pos vocab"], answers: Int[Tensor, "prompt 2"]
) -> Float[Tensor, "prompt"]:
    """Logit of the right minus logit of the wrong name at the last position."""
    return metrics.logit_diff(logits, answers)


def _logit_cases() -> dict[str, tuple]:
    logits = 9 * torch.randn(3, 4, 9, generator=ways.generator(1))
    return {"3 prompts of 4 tokens": (logits, torch.tensor([[2, 5], [7, 0], [8, 3]]))}


def _difference_at(logits: Tensor, position: int, answers: Tensor) -> Tensor:
    return metrics.logit_diff(logits[:, position][:, None], answers)


logit_difference = EXERCISES.add(
    number=1,
    name="logit_difference",
    title="logit difference",
    part="1",
    reference=logit_difference_answer,
    cases=_logit_cases,
    mistakes={
        "Your signs are turned round: the first column of `answers` is the right name, and "
        "the difference is right minus wrong.": lambda x, a: _difference_at(x, -1, a.flip(1)),
        "You read the logits at the first position; the answer comes after the last one, "
        "`logits[:, -1]`.": lambda x, a: _difference_at(x, 0, a),
        "You read the logits one position too early; what follows the last token is predicted at "
        "the last position, `logits[:, -1]`.": lambda x, a: _difference_at(x, -2, a),
        "You average over the positions; only the last one, `logits[:, -1]`, predicts the "
        "answer.": lambda x, a: metrics.logit_diff(x.mean(1, keepdim=True), a),
        "You subtract probabilities; the difference is one of logits, so no softmax.": (
            lambda x, a: metrics.logit_diff(x.softmax(-1), a)
        ),
        "That is the logit of the right name alone; subtract that of the wrong one.": (
            lambda x, a: x[:, -1].gather(1, a)[:, 0]
        ),
        "You add the two logits; subtract that of the wrong name.": (
            lambda x, a: x[:, -1].gather(1, a).sum(1)
        ),
        "You averaged over the prompts: return one difference per prompt, the standard error "
        "is computed from them.": lambda x, a: metrics.logit_diff(x, a).mean(),
        "You look up every prompt's names in every prompt; pick each prompt's own pair, with "
        "`gather` or by indexing rows too.": (
            lambda x, a: x[:, -1, a[:, 0]] - x[:, -1, a[:, 1]]  # [prompt prompt]
        ),
    },
)


# Exercises 2 and 3: reading the residual stream, and what each head adds to it


def _task_cases() -> dict[str, tuple]:
    return {"6 random prompts": ways.random_task(1)}


def _unit(model: TransformerBridge, answers: Tensor) -> Tensor:
    return torch.nn.functional.normalize(ways.direction(model, answers), dim=-1)


def _at_all_positions(model: TransformerBridge, tokens: Tensor, answers: Tensor) -> Tensor:
    written = partial(ways.head_attribution, model, tokens, answers, change=torch.ones_like)
    scale = ways.at_the_end(model, tokens, ["hook_embed"])[1]
    return sum(written(position=i) for i in range(tokens.shape[1])) / scale


logit_lens = EXERCISES.add(
    number=2,
    name="logit_lens",
    title="logit lens",
    part="2",
    reference=ways.logit_lens,
    cases=_task_cases,
    mistakes={
        "The scale is missing: divide every stage by the final LayerNorm's scale of that prompt.": (
            partial(ways.logit_lens, norm=lambda stream, scale: stream)
        ),
        "You multiply by the scale; the final LayerNorm divides by it.": (
            partial(ways.logit_lens, norm=lambda stream, scale: stream * scale)
        ),
        "You give each stage a scale of its own; hold that of the full run fixed, or the steps "
        "from stage to stage do not add up.": (
            lambda model, *args: ways.logit_lens(
                model, *args, norm=lambda stream, scale: model.ln_final(stream)
            )
        ),
        "You use one scale for all prompts; each prompt is divided by its own.": (
            partial(ways.logit_lens, norm=lambda stream, scale: stream / scale.mean())
        ),
        "You read the stream at the first position; the answer is read at the last one.": (
            partial(ways.logit_lens, position=0)
        ),
        "You read the stream one position too early; END is the last position.": (
            partial(ways.logit_lens, position=-2)
        ),
        "You divide by the scale twice; once is what the final LayerNorm does.": (
            partial(ways.logit_lens, norm=lambda stream, scale: stream / scale**2)
        ),
        "The bias of the unembedding is missing: `model.b_U` belongs to the logits too.": (
            partial(ways.logit_lens, bias=False)
        ),
        "You subtract probabilities; the difference is one of logits, so no softmax.": (
            partial(ways.logit_lens, read=lambda logits: logits.softmax(-1))
        ),
        "You show what each layer adds; the lens reads the stream as it stands, with all that was "
        "added so far.": lambda model, tokens, answers: ways.logit_lens(
            model, tokens, answers
        ).diff(dim=1, prepend=torch.zeros(len(tokens), 1)),
    },
)


head_attribution = EXERCISES.add(
    number=3,
    name="head_attribution",
    title="every head's direct attribution",
    part="2",
    reference=ways.head_attribution,
    cases=_task_cases,
    mistakes={
        "The scale of the final LayerNorm is missing: divide what the head writes by it, or the "
        "parts do not add up to the logit difference.": (
            partial(ways.head_attribution, change=torch.ones_like)
        ),
        "You multiply by the scale; the final LayerNorm divides by it.": (
            partial(ways.head_attribution, change=torch.reciprocal)
        ),
        "You use one scale for all prompts; each prompt is divided by its own.": (
            partial(ways.head_attribution, change=lambda scale: scale.mean())
        ),
        "You average over the dimensions of the stream; a dot product is their sum.": (
            lambda model, *args: ways.head_attribution(model, *args) / model.cfg.d_model
        ),
        "You made the direction a unit vector; logits are dot products with the unembedding "
        "itself, so keep its length.": partial(ways.head_attribution, towards=_unit),
        "That is what the heads write to the right name alone; the direction is its unembedding "
        "minus that of the wrong name.": partial(
            ways.head_attribution, towards=lambda model, answers: model.W_U[:, answers[:, 0]].T
        ),
        "You read what the heads write at the first position; the answer is written at the last "
        "one.": partial(ways.head_attribution, position=0),
        "You read what the heads write one position too early; END is the last position.": (
            partial(ways.head_attribution, position=-2)
        ),
        "You sum over what the heads write at all positions; only what they write at the last one "
        "reaches the answer.": lambda model, tokens, answers: _at_all_positions(
            model, tokens, answers
        ),
        "You divide by the scale twice; once is what the final LayerNorm does.": (
            partial(ways.head_attribution, change=torch.square)
        ),
        "You add the layer's bias to its heads: a head writes `z @ W_O`, and the bias belongs to "
        "none of them.": partial(ways.head_attribution, bias=True),
    },
)


# Exercise 4: corrupted prompts


def corrupt_s2_answer(
    tokens: ways.Tokens, positions: dict[str, Int[Tensor, "prompt"]]
) -> Int[Tensor, "prompt pos"]:
    """A copy of the prompts in which S2 is replaced by the name that stands at IO."""
    return _write(tokens, positions["S2"], _name(tokens, positions["IO"]))


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
    number=4,
    name="corrupt_s2",
    title="corrupted prompts",
    part="3",
    reference=corrupt_s2_answer,
    cases=_s2_cases,
    mistakes={
        "The prompts come out as they went in: return the copy that you changed.": (
            lambda tokens, at: tokens.clone()
        ),
        "You replaced the first mention of the subject; it is the second, `S2`, that says who "
        "is giving.": lambda tokens, at: _write(tokens, at["S1"], _name(tokens, at["IO"])),
        "You replaced the first mention of the subject too; only the second, `S2`, changes.": (
            lambda tokens, at: _write(
                corrupt_s2_answer(tokens, at), at["S1"], _name(tokens, at["IO"])
            )
        ),
        "It is the other way round: the name at IO is written over the name at S2, and IO stays.": (
            lambda tokens, at: _write(tokens, at["IO"], _name(tokens, at["S2"]))
        ),
        "You exchanged the two names; only S2 changes, IO stays.": (
            lambda tokens, at: _write(
                corrupt_s2_answer(tokens, at), at["IO"], _name(tokens, at["S2"])
            )
        ),
        "You wrote the *position* of IO over S2; look up the token that stands there.": (
            lambda tokens, at: _write(tokens, at["S2"], at["IO"])
        ),
        "You used the first prompt's positions for all prompts; each prompt has its own (IO "
        "comes first in ABBA, second in BABA).": (
            lambda tokens, at: set_at(tokens, (ALL, at["S2"][0]), tokens[:, at["IO"][0]])
        ),
        "`tokens[:, positions]` takes the positions of all prompts in every prompt; index the "
        "rows too, with `torch.arange(len(tokens))`.": (
            lambda tokens, at: set_at(tokens, (ALL, at["S2"]), tokens[:, at["IO"]])
        ),
    },
)


# Exercises 5 and 6: patch a head, and sweep over heads


def patch_head_answer(
    z: ways.Z,
    hook: HookPoint,
    clean_z: ways.Z,
    head: int,
    positions: Int[Tensor, "prompt place"],
) -> ways.Z:
    """The head's output taken from the clean run, at each prompt's own positions."""
    return ways.patched(z, clean_z, head, positions)


def _patch_cases() -> dict[str, tuple]:
    z, clean = torch.randn(2, 3, 6, 4, 5, generator=ways.generator(4)).unbind(0)
    places = torch.tensor([[1, 4], [3, 0], [2, 4]])
    return {
        "head 1 of 4 at two places": (z, hook_point(2), clean, 1, places),
        "head 3 of 4 at one place": (z, hook_point(5), clean, 3, places[:, :1]),
    }


patch_head = EXERCISES.add(
    number=5,
    name="patch_head",
    title="patch a head at some positions",
    part="3",
    reference=patch_head_answer,
    cases=_patch_cases,
    run=run_hook,
    mistakes={
        "The activation comes out as it went in: assign to it, or return the edited copy.": (
            lambda z, hook, clean, head, at: z
        ),
        "You patched every head of the layer; only `head` should change.": (
            lambda z, hook, clean, head, at: ways.patched(z, clean, ALL, at)
        ),
        "You gave the whole clean run back; only `head`, at `positions`, changes.": (
            lambda z, hook, clean, head, at: clean
        ),
        "You silenced the head; put its output in the clean run there.": (
            lambda z, hook, clean, head, at: ways.patched(z, 0 * clean, head, at)
        ),
        "You patched the head at every position; only each prompt's own `positions` change.": (
            lambda z, hook, clean, head, at: set_at(z, (ALL, ALL, head), clean[:, :, head])
        ),
        "`z[:, positions]` patches the positions of all prompts in every prompt; index the rows "
        "too, with `torch.arange(len(z))[:, None]`.": (
            lambda z, hook, clean, head, at: set_at(
                z, (ALL, at.flatten(), head), clean[:, at.flatten(), head]
            )
        ),
        "You used the first prompt's positions for all prompts; each prompt has its own.": (
            lambda z, hook, clean, head, at: ways.patched(z, clean, head, at[:1].expand_as(at))
        ),
        "You patched the first of the places only; `positions` may hold several for each "
        "prompt.": lambda z, hook, clean, head, at: ways.patched(z, clean, head, at[:, :1]),
        "Clean and corrupted are swapped: the run is the corrupted one, and one head of it "
        "gets the clean output.": (
            lambda z, hook, clean, head, at: ways.patched(clean, z, head, at)
        ),
        "You patched the position after: `positions` counts from 0, as the tensor does.": (
            lambda z, hook, clean, head, at: ways.patched(z, clean, head, at + 1)
        ),
        "You patched one dimension of every head: heads are the third axis of `z`.": (
            lambda z, hook, clean, head, at: ways.patched(z.mT, clean.mT, head, at).mT
        ),
    },
)


def _sweep_cases() -> dict[str, tuple]:
    layers = {21: [2, 1], 23: [1, 3]}
    return {f"layers {chosen}": (*ways.random_pair(i), chosen) for i, chosen in layers.items()}


sweep_heads = EXERCISES.add(
    number=6,
    name="sweep_heads",
    title="the patching sweep",
    part="3",
    reference=ways.sweep_heads,
    cases=_sweep_cases,
    mistakes={
        "Clean and corrupted are swapped: run the corrupted prompts, and take one head at a time "
        "from the clean run.": (
            lambda model, clean, bad, *rest: ways.sweep_heads(model, bad, clean, *rest)
        ),
        "Your patches change nothing: every run gives the corrupted figure. Is the new value "
        "taken from the clean run?": (
            lambda model, clean, bad, *rest: ways.sweep_heads(model, bad, bad, *rest)
        ),
        "You run the clean prompts; the run is the corrupted one, with one head from the clean "
        "run.": lambda model, clean, bad, *rest: ways.sweep_heads(model, clean, clean, *rest),
        "Earlier patches stay in place: each run has one head patched, so begin with a new list "
        "of hooks.": partial(ways.sweep_heads, kept=True),
        "You patch all heads of a layer at once; one head at a time.": partial(
            ways.sweep_heads, together=True
        ),
        "You patch the last position only; here a head is patched at every position.": (
            partial(ways.sweep_heads, at=slice(-1, None))
        ),
        "You leave the start token's position out; here a head is patched at every position.": (
            partial(ways.sweep_heads, at=slice(1, None))
        ),
        "You begin at layer 0; the layers to run through are those in `layers`, in their order.": (
            lambda *args: ways.sweep_heads(*args[:4], range(len(args[4])))
        ),
        "You return the share of the gap that comes back; return the logit difference of the "
        "patched run as it is.": lambda model, clean, bad, answers, layers: (
            metrics.normalised_effect(
                ways.sweep_heads(model, clean, bad, answers, layers),
                ways.run_under(model, clean, answers),
                ways.run_under(model, bad, answers),
            )
        ),
        "You subtract the corrupted figure; return the logit difference of the patched run as it "
        "is.": lambda model, clean, bad, answers, layers: (
            ways.sweep_heads(model, clean, bad, answers, layers)
            - ways.run_under(model, bad, answers)[:, None, None]
        ),
    },
)


# Exercise 7: attribution patching


def _slope_cases() -> dict[str, tuple]:
    return {"6 random prompts": ways.random_pair(31)}


attribution_patching = EXERCISES.add(
    number=7,
    name="attribution_patching",
    title="attribution patching",
    part="3",
    reference=ways.attribution_patching,
    cases=_slope_cases,
    mistakes={
        "Your signs are turned round: the step leads from the corrupted to the clean activation, "
        "so the difference is clean minus corrupted.": (
            partial(ways.attribution_patching, step=lambda new, old: old - new)
        ),
        "You take the gradient on the clean run; the corrupted run is the one that is patched.": (
            partial(ways.attribution_patching, on_clean=True)
        ),
        "You multiply the gradient by the clean activation; what counts is the step, clean minus "
        "corrupted.": partial(ways.attribution_patching, step=lambda new, old: new),
        "You multiply the gradient by the corrupted activation; what counts is the step, clean "
        "minus corrupted.": partial(ways.attribution_patching, step=lambda new, old: old),
        "You leave out the step: multiply the gradient by clean minus corrupted before you sum.": (
            partial(ways.attribution_patching, step=lambda new, old: torch.ones_like(new))
        ),
        "You take the last position only; a patch acts at all of them, so sum over positions.": (
            partial(ways.attribution_patching, summed=lambda x: x[:, :, -1].sum(-1))
        ),
        "You average over the positions; the effects of all places add up, so sum.": (
            partial(ways.attribution_patching, summed=lambda x: x.sum(-1).mean(-2))
        ),
        "You average over `d_head`; the step along every dimension counts, so sum.": (
            partial(ways.attribution_patching, summed=lambda x: x.sum(-3).mean(-1))
        ),
        "Clean and corrupted are swapped: the step leads to the clean activation, and the gradient "
        "is that of the corrupted run.": lambda model, clean, bad, answers: (
            ways.attribution_patching(model, bad, clean, answers)
        ),
        "You divide by the gap between the two runs; return the change in logits.": (
            lambda model, clean, bad, answers: (
                ways.attribution_patching(model, clean, bad, answers)
                / (ways.run_under(model, clean, answers) - ways.run_under(model, bad, answers))[
                    :, None, None
                ]
            )
        ),
        "You take absolute values before you sum; pushes in opposite directions cancel.": (
            partial(ways.attribution_patching, summed=lambda x: x.abs().sum((-3, -1)))
        ),
        "Your gradient is that of the mean over the prompts; take it of their sum, and each prompt "
        "has its own.": partial(
            ways.attribution_patching, summed=lambda x: x.sum((-3, -1)) / x.shape[1]
        ),
    },
)
