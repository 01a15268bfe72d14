"""Path patching: what a head does to later heads, or to the logits, by the direct path alone.

Everything stays as in the original run but (Wang et al. 2022, section 3 and appendix B)

    sender, from the new run  ->  residual stream and MLPs  ->  the receivers' q, k or v

All other heads are frozen, and without attention positions do not mix. So the way from sender to
receivers is run at the receivers' positions alone, computes no attention, and takes many senders
at once; the run from the receivers on is replayed (`utils.engine.replay`).
"""

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple
from weakref import WeakSet

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.engine.packs import in_packs, pack_size
from utils.engine.replay import Metric, Replay
from utils.engine.shortcuts import given_attention
from utils.heads import Head, all_heads, cache_heads, check_heads, key_value_head
from utils.patching import check_pair, n_site_heads

INPUTS = ("q", "k", "v")
_checked: WeakSet = WeakSet()
_refused: WeakSet = WeakSet()


class _Paths(NamedTuple):
    """The two runs, and where the paths lead."""

    recorded: Replay  # the original run, with every head's z and every attention output
    new: Mapping[str, Tensor]  # the new run's z
    receivers: dict[int, list[int]]  # heads at the site by layer; empty: the logits
    site: str | None
    columns: Int[Tensor, "prompt col"]  # positions of the receivers


@torch.no_grad()
def path_patch(
    model: TransformerBridge,
    original: Int[Tensor, "prompt pos"],
    new: Int[Tensor, "prompt pos"],
    metric: Metric,
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
    check_pair(model, original, new)
    every = senders is None
    chosen = all_heads(model) if every else check_heads(model, senders)
    by_layer = _receivers(model, receivers, site)
    _check_positions(original, positions, by_layer)
    kept = [f"blocks.{la}.attn.hook_{s}" for la in range(model.cfg.n_layers) for s in ("z", "out")]
    recorded = Replay(model, original, keep=kept)
    columns = _columns(recorded, original != new, positions, to_logits=not by_layer)
    paths = _Paths(recorded, cache_heads(model, new, ["z"]), by_layer, site, columns)

    top = max(by_layer, default=model.cfg.n_layers)
    linked = sorted({head for head in chosen if head.layer < top})
    if linked and model not in _checked and model not in _refused:
        _check(paths, linked[len(linked) // 2])
    unpatched = recorded.measure(metric, [])[0]
    values = dict.fromkeys(chosen, unpatched)
    if linked:
        size = pack_size(model, *original.shape, start=int(columns.min()))
        measured = in_packs(
            linked,
            size,
            lambda pack: _measure(paths, metric, pack),
            desc="path patching",
        )
        values |= zip(linked, measured, strict=True)
    result = torch.stack([values[head] for head in chosen], dim=1)
    return result.unflatten(1, (model.cfg.n_layers, model.cfg.n_heads)) if every else result


def _measure(paths: _Paths, metric: Metric, senders: list[Head]) -> Float[Tensor, "sender prompt"]:
    """The metric for each of the senders, which are sorted by layer."""
    recorded, model = paths.recorded, paths.recorded.model
    if model in _refused:
        return torch.stack([_measure_plainly(paths, metric, sender) for sender in senders])
    if not paths.receivers:
        resid = _through_mlps(paths, senders, [model.cfg.n_layers])[model.cfg.n_layers]
        return recorded.read_out(metric, resid.flatten(0, 1))
    start = _start(paths)
    hooks = _receiver_hooks(paths, _received(paths, senders), start)
    return recorded.measure(metric, hooks, start, copies=len(senders))


def _through_mlps(
    paths: _Paths, senders: list[Head], layers: Iterable[int]
) -> dict[int, Float[Tensor, "sender prompt col d_model"]]:
    """The residual stream before each of `layers`, for the senders below it.

    Every attention output is the recorded one, but for what the sender changes in its own layer:
    the change of its z, times W_O. Going up, each layer's senders join the batch.
    """
    recorded, top = paths.recorded, max(layers)
    resid = _at_columns(paths, recorded.hidden[0])[None][:0]
    found = {}
    for layer in range(senders[0].layer, top):
        found[layer] = resid
        joining = [head.head for head in senders if head.layer == layer]
        before = _at_columns(paths, recorded.hidden[layer])
        resid = torch.cat([resid, before.expand(len(joining), *before.shape)])
        output = _at_columns(paths, recorded.activations[f"blocks.{layer}.attn.hook_out"])
        output = output.repeat(len(resid), 1, 1, 1)
        output[len(resid) - len(joining) :] += _written(paths, layer, joining)
        with given_attention(recorded.model, {layer: output.flatten(0, 1)}):
            above = recorded.model.blocks[layer](resid.flatten(0, 1))
        above = above[0] if isinstance(above, tuple) else above
        resid = above.unflatten(0, resid.shape[:2])
    found[top] = resid
    return {layer: found[layer] for layer in found.keys() & set(layers)}


def _written(
    paths: _Paths, layer: int, heads: list[int]
) -> Float[Tensor, "sender prompt col d_model"]:
    """What the new run's z of each head would add to the residual stream."""
    name = f"blocks.{layer}.attn.hook_z"
    change = _at_columns(paths, paths.new[name] - paths.recorded.activations[name])
    w_o = paths.recorded.model.blocks[layer].attn.W_O[heads]  # [sender d_head d_model]
    return torch.einsum("pcsh,shd->spcd", change[:, :, heads], w_o)


def _received(
    paths: _Paths, senders: list[Head]
) -> dict[int, Float[Tensor, "sender prompt col receiver d_head"]]:
    """The receivers' q, k or v for each sender; as recorded where the sender is not below."""
    model = paths.recorded.model
    arriving = _through_mlps(paths, senders, list(paths.receivers))
    received = {}
    for layer, heads in paths.receivers.items():
        block = model.blocks[layer]
        recorded = _at_columns(paths, paths.recorded.hidden[layer])
        below = arriving.get(layer, recorded[None][:0])
        resid = torch.cat([below, recorded.expand(len(senders) - len(below), *recorded.shape)])
        inputs = getattr(block.attn, paths.site)(block.ln1(resid.flatten(0, 1)))
        inputs = inputs.reshape(*resid.shape[:3], n_site_heads(model, paths.site), -1)
        received[layer] = inputs[..., heads, :]
    return received


def _receiver_hooks(
    paths: _Paths, received: Mapping[int, Tensor], start: int
) -> list[tuple[str, Callable]]:
    """Hooks that put the receivers' inputs in place, for a run from position `start` on."""
    columns = paths.columns - start
    rows = torch.arange(len(columns), device=columns.device)[:, None]

    def put(values: Tensor, heads: list[int]) -> Callable:
        def hook_fn(activation: Tensor, hook) -> Tensor:
            activation = activation.clone()
            by_sender = activation.unflatten(0, (len(values), len(columns)))
            for i, head in enumerate(heads):
                by_sender[:, rows, columns, head] = values[..., i, :]
            return activation

        return hook_fn

    return [
        (f"blocks.{layer}.attn.hook_{paths.site}", put(received[layer], heads))
        for layer, heads in paths.receivers.items()
    ]


def _measure_plainly(paths: _Paths, metric: Metric, sender: Head) -> Float[Tensor, "prompt"]:
    """The same by two whole runs with hooks, as the paper describes it."""
    recorded, received = paths.recorded, {}

    def freeze(name: str, layer: int) -> Callable:
        def hook_fn(z: Tensor, hook) -> Tensor:
            z = recorded.activations[name].clone()
            if layer == sender.layer:
                z[:, :, sender.head] = paths.new[name][:, :, sender.head]
            return z

        return hook_fn

    def keep(layer: int, heads: list[int]) -> Callable:
        def hook_fn(activation: Tensor, hook) -> None:
            received[layer] = _at_columns(paths, activation)[None, ..., heads, :]

        return hook_fn

    names = [f"blocks.{layer}.attn.hook_z" for layer in range(recorded.model.cfg.n_layers)]
    hooks = [(name, freeze(name, layer)) for layer, name in enumerate(names)]
    hooks += [
        (f"blocks.{layer}.attn.hook_{paths.site}", keep(layer, heads))
        for layer, heads in paths.receivers.items()
    ]
    logits = recorded.model.run_with_hooks(recorded.tokens, fwd_hooks=hooks)[:, -1:]
    if not paths.receivers:
        return metric(logits)
    start = _start(paths)
    return recorded.measure(metric, _receiver_hooks(paths, received, start), start)[0]


def _check(paths: _Paths, sender: Head) -> None:
    """One sender both ways; a model for which they differ takes the plain path from then on."""

    def largest_logit(logits: Tensor) -> Float[Tensor, "prompt"]:
        return logits[:, -1].amax(-1)

    plain = _measure_plainly(paths, largest_logit, sender)
    try:
        exact = torch.allclose(_measure(paths, largest_logit, [sender])[0], plain, 1e-4, 1e-3)
    except (TypeError, RuntimeError, AttributeError):
        exact = False
    (_checked if exact else _refused).add(paths.recorded.model)
    if not exact:
        warnings.warn(
            "path patching: the attention of this model cannot be left out with the same result; "
            "it takes the plain path (two full forwards per sender).",
            stacklevel=3,
        )


def _at_columns(paths: _Paths, activation: Float[Tensor, "prompt pos *rest"]) -> Tensor:
    rows = torch.arange(len(paths.columns), device=paths.columns.device)[:, None]
    return activation[rows, paths.columns]


def _columns(
    recorded: Replay, changed: Tensor, positions: Tensor | None, to_logits: bool
) -> Int[Tensor, "prompt col"]:
    """Where the receivers read: the last position for the logits, else `positions` or all."""
    n_prompts, n_positions = changed.shape
    if positions is not None:
        return positions.to(changed.device)[:, None]
    first = n_positions - 1 if to_logits else recorded.first_position(changed)
    return torch.arange(first, n_positions, device=changed.device).repeat(n_prompts, 1)


def _start(paths: _Paths) -> int:
    read = torch.zeros_like(paths.recorded.tokens, dtype=torch.bool)
    return paths.recorded.first_position(read.scatter(1, paths.columns, True))


def _receivers(
    model: TransformerBridge, heads: Iterable[tuple[int, int]] | None, site: str | None
) -> dict[int, list[int]]:
    """Heads at the site, by layer: for "k" and "v" the key/value heads that they read."""
    if heads is None:
        if site is not None:
            raise ValueError(f"site={site!r} needs receivers")
        return {}
    if site not in INPUTS:
        raise ValueError(f"site must be one of {INPUTS} for receivers, got {site!r}")
    heads = check_heads(model, heads)
    by_layer = defaultdict(list)
    for head in sorted(set(heads if site == "q" else [key_value_head(model, h) for h in heads])):
        by_layer[head.layer].append(head.head)
    return dict(by_layer)


def _check_positions(tokens: Tensor, positions: Tensor | None, receivers: dict) -> None:
    if positions is None:
        return
    if not receivers:
        raise ValueError("positions are those of the receivers: give receivers too")
    if positions.shape != (len(tokens),) or positions.is_floating_point():
        raise ValueError(
            f"positions must be one integer for each of {len(tokens)} prompts, "
            f"got {positions.dtype} of shape {tuple(positions.shape)}"
        )
    if positions.min() < 0 or positions.max() >= tokens.shape[1]:
        raise ValueError(f"positions must lie in 0..{tokens.shape[1] - 1}, got {positions}")
