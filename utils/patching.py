"""Activation patching: run the corrupted prompts with one activation taken from the clean run.

Each function is a `sweep` (`utils.edits`) over one kind of patch, one value per prompt; the results
are those of `transformer_lens.patching`.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import indices
from utils.edits import check_sweep, each_head_from, only_at, record, stream_from, sweep
from utils.heads import all_heads, check_heads, n_site_heads
from utils.typed import checked


@checked
@torch.no_grad()
def patch_heads(
    model: TransformerBridge,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    metric: Callable,
    site: str = "z",
    heads: Iterable[tuple[int, int]] | None = None,
) -> Float[Tensor, "prompt *heads"]:
    """The metric with one head patched at a time, at all positions.

    `site` is the head's output "z", its "q", "k" or "v", or its attention "pattern". Gives
    [prompt layer head], or [prompt n] for a list of heads. For "k" and "v" heads are key/value
    heads: under grouped keys and values each is read by several query heads, and patching it
    changes them all (`key_value_head` finds the one a query head reads). `metric` gets the logits
    of the last position alone, [prompt 1 vocab]. Raises ValueError for an unknown site or head,
    prompts that differ in shape, and a metric that is not one per prompt.
    """
    check_sweep(model, {"clean": clean, "corrupted": corrupted}, metric)
    n_heads = n_site_heads(model, site)
    chosen = all_heads(model, site) if heads is None else check_heads(model, heads, site)
    top = max(head.layer for head in chosen)  # what lies above needs no recording
    from_clean = record(model, clean, [site], n_layers=top + 1)
    patches = each_head_from(model, chosen, from_clean, site)
    values = sweep(model, corrupted, metric, patches, desc="patching").T
    return values if heads is not None else values.unflatten(1, (model.cfg.n_layers, n_heads))


@checked
@torch.no_grad()
def patch_stream(
    model: TransformerBridge,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    metric: Callable,
    site: str = "resid_pre",
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "prompt layer place"]:
    """The metric with one position of one layer patched at a time.

    `site` is the residual stream before the layer ("resid_pre") or after it ("resid_post"), or
    what its attention ("attn_out") or MLP ("mlp_out") adds to it. Default: all positions and
    layers. `metric` gets the logits of the last position alone, [prompt 1 vocab]. Raises ValueError
    for prompts that differ in shape, positions, layers or a site that the model lacks, and a metric
    that is not one per prompt.
    """
    check_sweep(model, {"clean": clean, "corrupted": corrupted}, metric)
    n_layers, n_positions = model.cfg.n_layers, clean.shape[1]
    layers = indices("layers", range(n_layers) if layers is None else layers, n_layers)
    every = range(n_positions) if positions is None else positions
    positions = indices("positions", every, n_positions)
    places = [only_at(clean, position) for position in positions]
    stream_from(model, 0, 0.0, site)  # raises before anything runs
    from_clean = record(model, clean, [site], n_layers=max(layers) + 1)
    patches = [stream_from(model, la, from_clean, site, at) for la in layers for at in places]
    values = sweep(model, corrupted, metric, patches, desc="patching")
    return rearrange(values, "(layer pos) prompt -> prompt layer pos", pos=len(positions))
