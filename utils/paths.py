"""Path patching: what a head does to later heads, or to the logits, by the direct path alone.

Everything stays as in the original run but (Wang et al. 2022, section 3 and appendix B)

    sender, from the new run  ->  residual stream and MLPs  ->  the receivers' q, k or v

Unlike activation patching, which restores a corrupted run, this disturbs the original one. In
edits: freeze every head's z at the original run's, take the sender's from the new run, and read
off what arrives at the receivers; then run the original prompts with that put in place.
"""

from collections.abc import Callable, Iterable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_range
from utils.edits import Run, check_sweep, heads_from, hook_name, only_at, record, sweep
from utils.engine.direct import Streams, along_direct_paths
from utils.engine.readout import read_out
from utils.engine.replay import can_replay
from utils.heads import Head, all_heads, check_heads, key_value_head, n_site_heads
from utils.typed import checked

INPUTS = ("q", "k", "v")


@checked
@torch.no_grad()
def path_patch(
    model: TransformerBridge,
    original: Int[Tensor, "prompt pos"],
    new: Int[Tensor, "prompt pos"],
    metric: Callable,
    senders: Iterable[tuple[int, int]] | None = None,
    receivers: Iterable[tuple[int, int]] | None = None,
    site: str | None = None,
    positions: Int[Tensor, "prompt"] | None = None,
) -> Float[Tensor, "prompt *heads"]:
    """The metric of the original run with the path from one sender at a time taken from the new.

    Without `receivers` the path leads to the logits of the last position. With them it leads to
    their `site` ("q", "k" or "v") at `positions` (one per prompt; default: all), and all above is
    run again. Receivers are query heads: under grouped keys and values a "k" or "v" is shared, so
    the path then reaches every query head that reads it. MLPs are recomputed, other heads frozen.
    Gives [prompt layer head], or [prompt n] for a list of senders. A sender that is not below a
    receiver has no path: it gives the metric of the original run. `metric` gets the logits of the
    last position alone, [prompt 1 vocab]. Raises ValueError for prompts that differ in shape,
    unknown heads, receivers without a site (or the reverse) and positions out of range.
    """
    check_sweep(model, {"original": original, "new": new}, metric)
    every = senders is None
    senders = all_heads(model) if every else check_heads(model, senders, name="senders")
    targets = _targets(model, receivers, site)
    if positions is not None and not targets:
        raise ValueError("positions are those of the receivers: give receivers too")
    if positions is not None:
        check_range("positions", positions, original.shape[1])
    at = None if positions is None else only_at(original, positions)
    top = max(targets).layer if targets else None  # what lies above needs no recording
    from_original = record(model, original, ["z", "resid_pre", "out"], n_layers=top)
    from_new = record(model, new, ["z"], n_layers=top)
    if targets:
        # a sender that is not below a receiver changes nothing
        below = [head for head in dict.fromkeys(senders) if head.layer < top]
        runs = _arriving(model, original, below, targets, site, positions, from_original, from_new)
        put = heads_from(model, targets, 0.0, site, at)  # checks the model once
        put = {s: [e._replace(source=r) for e in put] for s, r in zip(below, runs, strict=True)}
        edits = [put.get(sender, []) for sender in senders]
        values = sweep(model, original, metric, edits, desc="path patching")
    else:
        values = _to_logits(model, original, metric, senders, from_original, from_new)
    values = rearrange(values, "sender prompt -> prompt sender")
    return values.unflatten(1, (model.cfg.n_layers, model.cfg.n_heads)) if every else values


def _to_logits(
    model: TransformerBridge,
    original: Int[Tensor, "prompt pos"],
    metric: Callable,
    senders: list[Head],
    from_original: Run,
    from_new: Run,
) -> Float[Tensor, "sender prompt"]:
    """The metric when one sender's z is the new run's and all others are frozen."""
    if _takes_recipe(model, from_original, original):
        frozen = heads_from(model, all_heads(model), from_original)
        edits = [heads_from(model, [sender], from_new) for sender in senders]
        return sweep(model, original, metric, edits, base=frozen, desc="path patching")
    last, top = torch.full_like(original[:, :1], original.shape[1] - 1), model.cfg.n_layers
    runs = (from_original.activations, from_new.activations)
    measure = lambda streams: read_out(model, metric, streams[top])  # noqa: E731
    return along_direct_paths(model, senders, [top], last, *runs, measure)


def _arriving(
    model: TransformerBridge,
    original: Int[Tensor, "prompt pos"],
    senders: list[Head],
    targets: list[Head],
    site: str,
    positions: Int[Tensor, "prompt"] | None,
    from_original: Run,
    from_new: Run,
) -> list[Run]:
    """The receivers' q, k or v when one sender's z is the new run's and all others are frozen."""
    layers = sorted({head.layer for head in targets})
    if _takes_recipe(model, from_original, original):
        frozen = [head for head in all_heads(model) if head.layer < layers[-1]]
        frozen = heads_from(model, frozen, from_original)
        edits = [[*frozen, *heads_from(model, [sender], from_new)] for sender in senders]
        return [record(model, original, [site], each) for each in edits]

    def inputs(streams: Streams) -> Float[Tensor, "sender layer prompt col head d_head"]:
        found = []
        for layer in layers:
            block, resid = model.blocks[layer], streams[layer]
            values = getattr(block.attn, site)(block.ln1(resid.flatten(0, 1)))
            found.append(values.reshape(*resid.shape[:3], n_site_heads(model, site), -1))
        return torch.stack(found, dim=1)

    every = torch.arange(original.shape[1], device=original.device).expand_as(original)
    columns = every if positions is None else positions[:, None].to(original.device)
    runs = (from_original.activations, from_new.activations)
    values = along_direct_paths(model, senders, layers, columns, *runs, inputs) if senders else []
    names = [hook_name(layer, site) for layer in layers]
    # with `positions` [prompt 1 head d_head]: the one stands for all, and only it is put in place
    return [Run(dict(zip(names, own, strict=True))) for own in values]


def _takes_recipe(model: TransformerBridge, from_original: Run, original: Tensor) -> bool:
    """Whether the recipe itself is to be run, and not the same without attention.

    Hooks of the reader's on the model would see the stream twice: as recorded, and as run again. A
    run under them has no tokens (`edits.Run`).
    """
    under_hooks = from_original.tokens is None
    return under_hooks or not can_replay(model, original)


def _targets(
    model: TransformerBridge, receivers: Iterable[tuple[int, int]] | None, site: str | None
) -> list[Head]:
    """Heads at the site: for "k" and "v" the key/value heads that the receivers read."""
    if receivers is None:
        if site is not None:
            raise ValueError(f"site={site!r} needs receivers")
        return []
    if site not in INPUTS:
        raise ValueError(f"site must be one of {INPUTS} for receivers, got {site!r}")
    heads = check_heads(model, receivers, name="receivers")
    shared = dict.fromkeys(key_value_head(model, head) for head in heads)
    return heads if site == "q" else list(shared)
