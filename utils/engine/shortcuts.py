"""Leave out a part of a block: attention whose output is known, an MLP where nobody reads it.

For the time of a `with` statement, the forward pass of that part is replaced.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Module
from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def given_attention(
    model: TransformerBridge, outputs: Mapping[int, Float[Tensor, "prompt pos d_model"]]
) -> Iterator[None]:
    """Within it, the attention of these layers is not computed: its output is the given one.

    Hooks on the attention's output still see it; those inside the attention are not reached.
    """

    def give(attention, output: Tensor) -> Callable:
        return lambda *_, **__: (attention.hook_out(output), None)

    attentions = {layer: model.blocks[layer].attn for layer in outputs}
    with ExitStack() as stack:
        for layer, output in outputs.items():
            stack.enter_context(_forward_of(attentions[layer], give(attentions[layer], output)))
        yield


@contextmanager
def mlp_only_at(block: Module, read: slice | list[int]) -> Iterator[None]:
    """Within it, the block's MLP is computed at the positions `read` alone, and 0 elsewhere."""
    mlp = getattr(block, "mlp", None)
    if mlp is None:
        yield
        return
    whole = mlp.forward

    def forward(resid: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:  # not by position, perhaps
            return whole(resid, *args, **kwargs)
        some = whole(resid[:, read])
        if not isinstance(some, Tensor):  # a mixture of experts may give its routing too
            return whole(resid)
        out = torch.zeros_like(resid)
        out[:, read] = some
        return out

    with _forward_of(mlp, forward):
        yield


@contextmanager
def _forward_of(module: Module, forward: Callable) -> Iterator[None]:
    # past the module's own __setattr__, which would change the wrapped Hugging Face module
    attributes = vars(module)
    attributes["forward"] = forward
    try:
        yield
    finally:
        attributes.pop("forward", None)
