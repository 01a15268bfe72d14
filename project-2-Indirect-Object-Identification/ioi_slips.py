"""Slips that any experiment can have: how logits are read, where hooks hang, what is ablated.

Each function takes an experiment of `ioi_experiments` and gives mistakes, as exercises list them:
what to tell -> the experiment with that slip.
"""

from collections.abc import Callable, Iterable
from functools import partial

import ioi_experiments as ways
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils import metrics
from utils.edits import hook_name
from utils.exercises.exercise import set_at

ALL = slice(None)
_run, _kept = ways.run_under, ways.run_kept

READINGS = {
    "You read the logits at the first position; the answer comes after the last one, "
    "`logits[:, -1]`.": lambda x, a: metrics.logit_diff(x[:, :1], a),
    "You read the logits one position too early; what follows the last token is predicted at "
    "the last position, `logits[:, -1]`.": lambda x, a: metrics.logit_diff(x[:, :-1], a),
    "You average over the positions; only the last one, `logits[:, -1]`, predicts the "
    "answer.": lambda x, a: metrics.logit_diff(x.mean(1, keepdim=True), a),
    "You subtract probabilities; the difference is one of logits, so no softmax.": (
        lambda x, a: metrics.logit_diff(x.softmax(-1), a)
    ),
    "That is the logit of the right name alone; subtract that of the wrong one.": (
        lambda x, a: x[:, -1].gather(1, a)[:, 0]
    ),
    "You use the first prompt's names for all prompts; each has its own.": (
        lambda x, a: metrics.logit_diff(x, a[:1].expand_as(a))
    ),
}


def misread(experiment: Callable) -> dict[str, Callable]:
    """The experiment with the logits read in each of these ways."""
    readings = READINGS.items()
    return {text: ways.otherwise("logit_diff", read, experiment) for text, read in readings}


def misplaced(experiment: Callable) -> dict[str, Callable]:
    """The experiment with its hooks at the queries, keys or values."""
    sites = {"queries": "q", "keys": "k", "values": "v"}
    found = {}
    for what, other in sites.items():
        text = f"Your hooks are at the {what}, `hook_{other}`; what heads give is at `hook_z`."
        name = partial(
            lambda layer, site, to: hook_name(layer, to if site == "z" else site), to=other
        )
        found[text] = ways.otherwise("hook_name", name, experiment)
    return found


def with_mlps_frozen(
    model: TransformerBridge, tokens: Tensor, answers: Tensor, hooks: Iterable = ()
) -> Tensor:
    """The run with every MLP at what it gives without the hooks."""
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.cfg.n_layers)]
    plain = model.run_with_cache(tokens, names_filter=names)[1]
    frozen = [(name, lambda x, hook, name=name: plain[name]) for name in names]
    return _run(model, tokens, answers, [*hooks, *frozen])


def _changed(
    change: Callable,
    model: TransformerBridge,
    tokens: Tensor,
    answers: Tensor,
    means: Tensor,
    keep: Tensor,
    layers: Iterable[int] | None = None,
) -> Tensor:
    return _kept(model, tokens, answers, *change(means, keep), layers)


def misrun(experiment: Callable, but: Iterable[str] = ()) -> dict[str, Callable]:
    """The experiment with other means or another mask in all its runs."""
    return {
        text: ways.otherwise("run_kept", partial(_changed, change), experiment)
        for text, change in RUNS.items()
        if not any(part in text for part in but)
    } | misplaced(experiment)


def without_mlps(
    model: TransformerBridge, tokens: Tensor, answers: Tensor, hooks: Iterable
) -> Tensor:
    names = [f"blocks.{layer}.hook_mlp_out" for layer in range(model.cfg.n_layers)]
    return _run(
        model, tokens, answers, [*hooks, *((name, lambda x, hook: 0 * x) for name in names)]
    )


def _mean(x: Tensor, axis: int) -> Tensor:
    return x.mean(axis, keepdim=True).expand_as(x)


def _any(x: Tensor, axis: int) -> Tensor:
    return x.any(axis, keepdim=True).expand_as(x)


RUNS = {
    "That is a zero ablation; put the means in place of what is not kept.": (
        lambda means, keep: (0 * means, keep)
    ),
    "It is the other way round: where the mask is True the output stays, elsewhere it becomes "
    "its mean.": lambda means, keep: (means, ~keep),
    "You average `means` over the prompts: each prompt already has the mean of its own "
    "template there.": lambda means, keep: (_mean(means, 0), keep),
    "You average `means` over the positions: each position has its own.": (
        lambda means, keep: (_mean(means, 2), keep)
    ),
    "You average `means` over the heads: each head has its own.": (
        lambda means, keep: (_mean(means, 3), keep)
    ),
    "You use the first prompt's `means` for all prompts; each has its own.": (
        lambda means, keep: (means[:1].expand_as(means), keep)
    ),
    "You use the first prompt's mask for all prompts; each has its own.": (
        lambda means, keep: (means, keep[:1].expand_as(keep))
    ),
    "You keep what is kept in *any* prompt; the mask has a row for each prompt, because the "
    "positions differ.": lambda means, keep: (means, _any(keep, 0)),
    "You keep heads at all positions; they stay only at the positions that the mask marks.": (
        lambda means, keep: (means, _any(keep, 2))
    ),
    "You keep all heads at a position where one is kept; each head has its own mask.": (
        lambda means, keep: (means, _any(keep, 3))
    ),
    "You keep a head in every layer if it is kept in one; each layer has its own mask.": (
        lambda means, keep: (means, _any(keep, 1))
    ),
    "You take the mask of another layer; layers are counted from 0.": (
        lambda means, keep: (means, keep.roll(1, 1))
    ),
    "You take the means of another layer; layers are counted from 0.": (
        lambda means, keep: (means.roll(1, 1), keep)
    ),
    "You take means and mask of another layer; layers are counted from 0.": (
        lambda means, keep: (means.roll(1, 1), keep.roll(1, 1))
    ),
    "You take the mask of another position; positions are counted from 0.": (
        lambda means, keep: (means, keep.roll(1, 2))
    ),
    "You leave the first layer as it is; every layer is ablated.": (
        lambda means, keep: (means, set_at(keep, (ALL, 0), True))
    ),
    "You leave the last layer as it is; every layer is ablated.": (
        lambda means, keep: (means, set_at(keep, (ALL, -1), True))
    ),
    "Every layer gets means and mask of the last: a function made in a loop sees the loop's "
    "variable as it is when called. Ask `hook.layer()`.": (
        lambda means, keep: (means[:, -1:].expand_as(means), keep[:, -1:].expand_as(keep))
    ),
}
