"""Exercises of the IOI notebook, parts 1 to 3; `ioi_exercises` has the others."""

from collections.abc import Callable
from functools import partial

import ioi_experiments as ways
import torch
from ioi_slips import READINGS, misplaced, misread
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.hook_points import HookPoint
from transformer_lens.model_bridge import TransformerBridge

from utils import metrics
from utils.edits import hook_name
from utils.exercises.exercise import Exercises, hook_point, run_hook, set_at

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


logit_difference = EXERCISES.add(
    number=1,
    name="logit_difference",
    title="logit difference",
    part="1",
    reference=logit_difference_answer,
    cases=_logit_cases,
    mistakes={
        **READINGS,
        "Your signs are turned round: the first column of `answers` is the right name, and "
        "the difference is right minus wrong.": lambda x, a: metrics.logit_diff(x, a.flip(1)),
        "That is the logit of the wrong name alone; subtract it from that of the right one.": (
            lambda x, a: x[:, -1].gather(1, a)[:, 1]
        ),
        "You sum over the positions; only the last one, `logits[:, -1]`, predicts the answer.": (
            lambda x, a: metrics.logit_diff(x.sum(1, keepdim=True), a)
        ),
        "You read the logits at the second position; the answer comes after the last one.": (
            lambda x, a: metrics.logit_diff(x[:, :2], a)
        ),
        "You subtract the mean over the vocabulary; subtract the logit of the wrong name.": (
            lambda x, a: metrics.logit_diff(x, a) + x[:, -1].gather(1, a)[:, 1] - x[:, -1].mean(-1)
        ),
        "You compare the largest logits; look up those of the two names in `answers`.": (
            lambda x, a: x[:, -1].topk(2).values.diff(dim=1)[:, 0].neg()
        ),
        "You read every position of the last prompt; `logits[:, -1]` is the last position.": (
            lambda x, a: metrics.logit_diff(x[-1, : len(a), None], a)
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


def _sum_of_z(model: TransformerBridge, tokens: Tensor) -> Tensor:
    names = [hook_name(layer, "z") for layer in range(model.cfg.n_layers)]
    z, scale = ways.at_the_end(model, tokens, names)
    return z.sum(-1) / scale


def _at_other_scale(
    place: int, model: TransformerBridge, tokens: Tensor, names: list[str], position: int = -1
) -> tuple[Tensor, Tensor]:
    """What stands at the position, with the scale of another one."""
    read = partial(_at_the_end, model, tokens, names)
    return read(position)[0], read(place)[1]


def other_scales(experiment: Callable) -> dict[str, Callable]:
    """The experiment with the scale of another position."""
    places = {"first position": 0, "position before the last": -2}
    return {
        f"Your scale is that of the {place}; take it where you read, at the last one.": (
            ways.otherwise("at_the_end", partial(_at_other_scale, other), experiment)
        )
        for place, other in places.items()
    }


_at_the_end = ways.at_the_end
DIRECTIONS = {
    "the sum of both": lambda model, a: (model.W_U[:, a[:, 0]] + model.W_U[:, a[:, 1]]).T,
    "that of the wrong name alone": lambda model, a: model.W_U[:, a[:, 1]].T,
    "the first prompt's": lambda model, a: ways.direction(model, a[:1].expand_as(a)),
    "the mean over the prompts": lambda model, a: (
        ways.direction(model, a).mean(0, keepdim=True).expand(len(a), -1)
    ),
    "one of embeddings, `W_E`": lambda model, a: model.W_E[a[:, 0]] - model.W_E[a[:, 1]],
}
WEIGHTS = {
    "the first layer's `W_O` for all": lambda model: model.W_O[:1].expand_as(model.W_O),
    "the `W_O` of the layer below": lambda model: model.W_O.roll(1, 0),
    "the first head's `W_O` for all": lambda model: model.W_O[:, :1].expand_as(model.W_O),
    "each other's `W_O`": lambda model: model.W_O.flip(1),
    "`W_V` for `W_O`": lambda model: model.W_V.mT,
}


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
        "The scale is missing, and the bias `model.b_U` too.": (
            partial(ways.logit_lens, norm=lambda stream, scale: stream, bias=False)
        ),
        "You give each stage a scale of its own, and the bias `model.b_U` is missing.": (
            lambda model, *args: ways.logit_lens(
                model, *args, norm=lambda stream, scale: model.ln_final(stream), bias=False
            )
        ),
        "You use the first prompt's scale for all prompts; each prompt is divided by its own.": (
            partial(ways.logit_lens, norm=lambda stream, scale: stream / scale[:1])
        ),
        **other_scales(ways.logit_lens),
        "You divide the bias by the scale too; add `model.b_U` after the division.": (
            lambda model, tokens, answers: (
                ways.logit_lens(model, tokens, answers, norm=lambda stream, scale: stream)
                / ways.at_the_end(model, tokens, ["hook_embed"])[1][..., 0]
            )
        ),
        **{
            f"Your bias has the wrong weight, {weight}: add `model.b_U` once.": (
                partial(ways.logit_lens, bias=weight)
            )
            for weight in (-1, 2)
        },
        "You read the stream between attention and MLP; read it before every layer, "
        "`resid_pre`.": partial(ways.logit_lens, site="resid_mid"),
        "You read what attention writes; read the stream, `resid_pre`, with all that was added "
        "so far.": partial(ways.logit_lens, site="attn_out"),
        "That is the logit of the right name alone; subtract that of the wrong one.": (
            ways.otherwise("logit_diff", lambda x, a: x[:, -1].gather(1, a)[:, 0], ways.logit_lens)
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
        **{
            f"Your direction is {what}; it is the unembedding of each prompt's right name minus "
            "that of its wrong one.": partial(ways.head_attribution, towards=towards)
            for what, towards in DIRECTIONS.items()
        },
        **{
            f"You take {what}; a head writes its own `z @ W_O` of its own layer.": (
                partial(ways.head_attribution, weights=weights)
            )
            for what, weights in WEIGHTS.items()
        },
        **misplaced(ways.head_attribution),
        "You sum z itself; send it through `W_O`, then take the dot product with the direction.": (
            lambda model, tokens, answers: _sum_of_z(model, tokens)
        ),
        "You put what each head writes through a norm of its own; divide it by the scale of the "
        "full run.": lambda model, *args: ways.head_attribution(
            model, *args, shown=model.ln_final, change=torch.ones_like
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


MISWRITTEN = (
    ("the token after the one at IO", lambda t, at: _write(t, at["S2"], _name(t, at["IO"] + 1))),
    ("the token before the one at IO", lambda t, at: _write(t, at["S2"], _name(t, at["IO"] - 1))),
    ("one position too early", lambda t, at: _write(t, at["S2"] - 1, _name(t, at["IO"]))),
    (
        "one position too late",
        lambda t, at: _write(t, (at["S2"] + 1).clamp(max=7), _name(t, at["IO"])),
    ),
    ("at the last position", lambda t, at: set_at(t, (ALL, -1), _name(t, at["IO"]))),
    ("at the first prompt's S2", lambda t, at: set_at(t, (ALL, at["S2"][0]), _name(t, at["IO"]))),
    (
        "what stands at the first prompt's IO",
        lambda t, at: _write(t, at["S2"], t[:, at["IO"][0]]),
    ),
    ("the first prompt's name", lambda t, at: _write(t, at["S2"], _name(t, at["IO"])[0])),
    ("zero", lambda t, at: _write(t, at["S2"], 0)),
    ("zeros elsewhere", lambda t, at: _write(0 * t, at["S2"], _name(t, at["IO"]))),
)

corrupt_s2 = EXERCISES.add(
    number=4,
    name="corrupt_s2",
    title="corrupted prompts",
    part="3",
    reference=corrupt_s2_answer,
    cases=_s2_cases,
    mistakes={
        "The prompts come out as they went in: return the copy that you changed, and write the "
        "name at IO, not that at S1, which stands at S2 already.": (
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
        **{
            f"You write {what}; each prompt's name at IO belongs at its S2.": f
            for what, f in MISWRITTEN
        },
        "You exchanged the name at IO with the first mention of the subject; only S2 changes.": (
            lambda tokens, at: _write(
                _write(tokens, at["S1"], _name(tokens, at["IO"])), at["IO"], _name(tokens, at["S1"])
            )
        ),
        "You replaced all from S2 on; only S2 changes.": lambda tokens, at: torch.where(
            torch.arange(tokens.shape[1]) >= at["S2"][:, None],
            _name(tokens, at["IO"])[:, None],
            tokens,
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


_put = ways.patched
MISPATCHED = (
    ("patch the position before", lambda z, _, clean, head, at: _put(z, clean, head, at - 1)),
    ("patch the head before", lambda z, _, clean, head, at: _put(z, clean, head - 1, at)),
    ("patch the heads before", lambda z, _, clean, head, at: _put(z, clean, slice(head), at)),
    (
        "patch all heads but `head`",
        lambda z, _, clean, head, at: _put(_put(z, clean, ALL, at), z, head, at),
    ),
    (
        "patch all positions but these",
        lambda z, _, clean, head, at: _put(
            set_at(z, (ALL, ALL, head), clean[:, :, head]), z, head, at
        ),
    ),
    ("patch the last place only", lambda z, _, clean, head, at: _put(z, clean, head, at[:, -1:])),
    (
        "patch the last position",
        lambda z, _, clean, head, at: set_at(z, (ALL, -1, head), clean[:, -1, head]),
    ),
    (
        "patch the first prompt only",
        lambda z, _, clean, head, at: set_at(z, 0, _put(z, clean, head, at)[0]),
    ),
    ("add the clean output", lambda z, _, clean, head, at: _put(z, z + clean, head, at)),
    ("put the difference in", lambda z, _, clean, head, at: _put(z, clean - z, head, at)),
    (
        "put the mean over the prompts in",
        lambda z, _, clean, head, at: _put(z, 0 * z + clean.mean(0), head, at),
    ),
)

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
        **{
            f"You {what}; at `positions`, `head` is that of `clean_z`.": f for what, f in MISPATCHED
        },
        "You patched one dimension of every head: heads are the third axis of `z`.": (
            lambda z, hook, clean, head, at: ways.patched(z.mT, clean.mT, head, at).mT
        ),
    },
)


def _sweep_cases() -> dict[str, tuple]:
    layers = {21: [2, 1], 23: [1, 3]}
    return {f"layers {chosen}": (*ways.random_pair(i), chosen) for i, chosen in layers.items()}


_record, _run = ways.record_z, ways.run_under
RECORDS = {
    "zeros": lambda model, tokens: 0 * _record(model, tokens),
    "means over the prompts": lambda model, tokens: (
        _record(model, tokens).mean(1, keepdim=True).expand(-1, len(tokens), -1, -1, -1)
    ),
    "means over the positions": lambda model, tokens: (
        _record(model, tokens).mean(2, keepdim=True).expand(-1, -1, tokens.shape[1], -1, -1)
    ),
}
PLACES = {
    "the last position only": slice(-1, None),
    "the first position only": slice(1),
    "the position before the last only": slice(-2, -1),
    "all positions but the last": slice(-1),
    "all positions but that of the start token": slice(1, None),
}


def _in_every_layer(
    model: TransformerBridge, tokens: Tensor, answers: Tensor, hooks: list
) -> Tensor:
    return _run(model, tokens, answers, ways.every(model, hooks[-1][1]))


def _share_of_gap(
    model: TransformerBridge,
    clean: Tensor,
    bad: Tensor,
    answers: Tensor,
    *rest: object,
    gap: Callable,
) -> Tensor:
    """The sweep on a scale where the corrupted run is 0 and the clean run 1."""
    ends = [_run(model, tokens, answers) for tokens in (clean, bad)]
    found = ways.sweep_heads(model, clean, bad, answers, *rest)
    return (found - ends[1][:, None, None]) / gap(*ends)


def _all_but(z: Tensor, clean_z: Tensor, head: int, positions: Tensor) -> Tensor:
    return _put(clean_z, z, head, positions)


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
        "taken from the clean run, and does your hook return what it edits, or edit in place?": (
            lambda model, clean, bad, *rest: ways.sweep_heads(model, bad, bad, *rest)
        ),
        "All your runs give the clean figure; the run is that of the corrupted prompts, with one "
        "head, not the whole stream, from the clean run.": lambda model, clean, bad, *rest: (
            ways.sweep_heads(model, clean, clean, *rest)
        ),
        "Earlier patches stay in place: each run has one head patched, so begin with a new list "
        "of hooks.": partial(ways.sweep_heads, kept=lambda head: True),
        "Patches of earlier heads of the layer stay in place: each run has one head patched, so "
        "begin with a new list of hooks for each.": (
            partial(ways.sweep_heads, kept=lambda head: head > 0)
        ),
        **misread(ways.sweep_heads),
        **misplaced(ways.sweep_heads),
        **{
            f"You patch {what}; here a head is patched at every position.": (
                partial(ways.sweep_heads, at=at)
            )
            for what, at in PLACES.items()
        },
        **{
            f"You put {what} in; put the head's output in the clean run there.": (
                ways.otherwise("record_z", record, ways.sweep_heads)
            )
            for what, record in RECORDS.items()
        },
        "You patch that head number in every layer; one head of one layer at a time.": (
            ways.otherwise("run_under", _in_every_layer, ways.sweep_heads)
        ),
        "You patch all heads of the layer but one; one head at a time.": (
            ways.otherwise("patched", _all_but, ways.sweep_heads)
        ),
        "You hook one layer too low: `blocks.{layer}` counts from 0, as `layers` does.": (
            lambda *args: ways.sweep_heads(*args[:4], [layer - 1 for layer in args[4]])
        ),
        "You patch all heads of a layer at once; one head at a time.": partial(
            ways.sweep_heads, together=True
        ),
        "You begin at layer 0; the layers to run through are those in `layers`, in their order.": (
            lambda *args: ways.sweep_heads(*args[:4], range(len(args[4])))
        ),
        "You return the share of the gap that comes back; return the logit difference of the "
        "patched run as it is.": [
            partial(_share_of_gap, gap=lambda clean, bad: clean.mean() - bad.mean()),
            partial(_share_of_gap, gap=lambda clean, bad: (clean - bad)[:, None, None]),
        ],
        "You subtract the corrupted figure; return the logit difference of the patched run as it "
        "is.": lambda model, clean, bad, answers, layers: (
            ways.sweep_heads(model, clean, bad, answers, layers)
            - ways.run_under(model, bad, answers)[:, None, None]
        ),
        "You subtract from the clean figure; return the logit difference of the patched run as it "
        "is.": lambda model, clean, bad, answers, layers: (
            ways.run_under(model, clean, answers)[:, None, None]
            - ways.sweep_heads(model, clean, bad, answers, layers)
        ),
    },
)


# Exercise 7: attribution patching


def _slope_cases() -> dict[str, tuple]:
    return {"6 random prompts": ways.random_pair(31)}


SUMS = {
    "the first position only": lambda x: x[:, :, 0].sum(-1),
    "the last position only": lambda x: x[:, :, -1].sum(-1),
    "all positions but the first": lambda x: x[:, :, 1:].sum((-3, -1)),
    "the mean over `d_head`": lambda x: x.sum(-3).mean(-1),
    "the mean over the positions": lambda x: x.sum(-1).mean(-2),
    "squares": lambda x: x.square().sum((-3, -1)),
    "lengths": lambda x: x.norm(dim=(-3, -1)),
    "the largest position": lambda x: x.sum(-1).amax(-2),
}

attribution_patching = EXERCISES.add(
    number=7,
    name="attribution_patching",
    title="attribution patching",
    part="3",
    reference=ways.attribution_patching,
    cases=_slope_cases,
    mistakes={
        "Your signs are turned round: the step is clean minus corrupted, and the logit difference "
        "right minus wrong, columns 0 and 1 of `answers`.": (
            lambda *args: -ways.attribution_patching(*args)
        ),
        "You take the gradient on the clean run; the corrupted run is the one that is patched.": (
            partial(ways.attribution_patching, on_clean=True)
        ),
        "You multiply the gradient by the clean activation; what counts is the step, clean minus "
        "corrupted.": partial(
            ways.attribution_patching, effect=lambda new, old, slope: new * slope
        ),
        "You multiply the gradient by the corrupted activation; what counts is the step, clean "
        "minus corrupted.": partial(
            ways.attribution_patching, effect=lambda new, old, slope: old * slope
        ),
        "You leave out the step: multiply the gradient by clean minus corrupted before you sum.": (
            partial(ways.attribution_patching, effect=lambda new, old, slope: slope)
        ),
        "You leave out the gradient: multiply clean minus corrupted by it before you sum.": (
            partial(ways.attribution_patching, effect=lambda new, old, slope: new - old)
        ),
        "You average the step over the prompts; each prompt has its own.": partial(
            ways.attribution_patching,
            effect=lambda new, old, slope: (new - old).mean(1, keepdim=True) * slope,
        ),
        "Your gradients stand in the order from the last layer to the first: backward hooks run in "
        "that order, so turn the list round.": partial(
            ways.attribution_patching, effect=lambda new, old, slope: (new - old) * slope.flip(0)
        ),
        "You cut the graph at every layer, so that later heads do not react: keep and return the z "
        "that the hook gets, without `detach`.": partial(ways.attribution_patching, cut=True),
        **misread(ways.attribution_patching),
        **misplaced(ways.attribution_patching),
        "Those are the exact effects, by patching; here they are guessed from the gradient.": (
            lambda model, clean, bad, answers: (
                ways.sweep_heads(model, clean, bad, answers, list(range(model.cfg.n_layers)))
                - ways.run_under(model, bad, answers)[:, None, None]
            )
        ),
        **{
            f"You take {what}; sum the products over all positions and `d_head`, signs and all.": (
                partial(ways.attribution_patching, summed=summed)
            )
            for what, summed in SUMS.items()
        },
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
