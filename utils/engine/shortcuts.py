"""Leave out attention whose output is known: its forward pass is replaced for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge


@contextmanager
def given_attention(
    model: TransformerBridge, layer: int, output: Float[Tensor, "prompt pos d_model"]
) -> Iterator[None]:
    """Within it, the layer's attention is not computed: its output is the given one.

    Hooks on the attention's output still see it; those inside the attention are not reached.
    """
    attention = model.blocks[layer].attn
    # past the module's own __setattr__, which would change the wrapped Hugging Face module
    attributes = vars(attention)
    attributes["forward"] = lambda *_, **__: (attention.hook_out(output), None)
    try:
        yield
    finally:
        del attributes["forward"]
