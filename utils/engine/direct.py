"""What heads send along direct paths, for many senders at once, without computing attention.

With all heads frozen but one no position looks at another, so a path needs only the MLPs between
sender and receiver, at the receivers' positions. `utils.paths` has the recipe that this equals.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from einops import einsum
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from utils.engine.memory import check_fits
from utils.engine.packs import bytes_of_row, in_packs, rows_that_fit
from utils.engine.replay import output_of
from utils.engine.shortcuts import given_attention

Streams = dict[int, Float[Tensor, "sender prompt col d_model"]]


def along_direct_paths(
    model: TransformerBridge,
    senders: Sequence[tuple[int, int]],
    layers: Sequence[int],
    columns: Int[Tensor, "prompt col"],
    original: Mapping[str, Tensor],
    new: Mapping[str, Tensor],
    receive: Callable[[Streams], Float[Tensor, "sender *rest"]],
) -> Float[Tensor, "sender *rest"]:
    """`receive` of the residual stream at `columns` before each of `layers`, sender by sender.

    Activations by hook name: the original run's block inputs, z and attention outputs, the new
    run's z. Layer n_layers stands for the stream above the last block.
    """
    order = sorted(range(len(senders)), key=senders.__getitem__)
    n_columns = columns.shape[1] + 1  # one more, for what is held of the original run
    size = max(1, rows_that_fit(model, n_columns) // len(columns))
    rows = torch.arange(len(columns), device=columns.device)[:, None]

    def streams(pack: list[tuple[int, int]]) -> Streams:
        def at_columns(run: Mapping[str, Tensor], layer: int, site: str) -> Tensor:
            return run[f"blocks.{layer}.{site}"][rows, columns]  # [prompt col *rest]

        def unchanged(layer: int, n: int) -> Float[Tensor, "sender prompt col d_model"]:
            resid = at_columns(original, layer, "hook_resid_pre")
            return resid.expand(n, *resid.shape)

        n_bytes = len(pack) * len(columns) * bytes_of_row(model, n_columns)
        check_fits("A run of the paths", n_bytes, len(columns), columns.device)
        first, top = pack[0][0], max(layers)
        found = {layer: unchanged(layer, len(pack)) for layer in layers if layer < first}
        # [sender prompt col d_model], in the order of the pack, which is by layer: of the senders
        # at or below this layer; for the rest of the pack the stream is still the original's
        resid = unchanged(first, 0)
        for layer in range(first, top):
            if layer in layers:
                found[layer] = torch.cat([resid, unchanged(layer, len(pack) - len(resid))])
            heads = [head for at, head in pack if at == layer]
            resid = torch.cat([resid, unchanged(layer, len(heads))])  # this layer's senders join
            z_new, z = (at_columns(run, layer, "attn.hook_z") for run in (new, original))
            w_o = model.blocks[layer].attn.W_O[heads]
            attention = at_columns(original, layer, "attn.hook_out").repeat(len(resid), 1, 1, 1)
            attention[len(resid) - len(heads) :] += einsum(
                (z_new - z)[:, :, heads], w_o, "prompt col s h, s h d -> s prompt col d"
            )
            with given_attention(model, layer, attention.flatten(0, 1)):
                above = output_of(model.blocks[layer](resid.flatten(0, 1)))
            resid = above.unflatten(0, resid.shape[:2])
        return found | {top: resid}

    with tqdm(total=len(senders), desc="paths", leave=False) as progress:
        ordered = [senders[i] for i in order]
        values = in_packs(ordered, size, lambda pack: receive(streams(pack)), progress)
    return values[torch.tensor(order, device=values.device).argsort()]
