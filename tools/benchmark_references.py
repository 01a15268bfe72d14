"""What the benchmark compares with: TransformerLens's own loops, and a plain Hugging Face loop.

Each function takes a list of patches, runs the model once for each (twice for a path), and gives
one value per patch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

Patch = tuple[int, int]  # layer, and head or position
AXIS = {"resid_pre": "pos"}


def transformer_lens_loop(
    model: TransformerBridge,
    clean: Tensor,
    corrupted: Tensor,
    metric: Callable[[Tensor], Tensor],
    site: str,
) -> Callable[[Sequence[Patch]], Float[Tensor, "patch"]]:
    """`transformer_lens.patching`: "resid_pre" by position, or "z", "q", "k", "v" by head."""
    name = "resid_pre" if site == "resid_pre" else f"attn_head_{site.replace('z', 'out')}_all_pos"
    sweep = getattr(patching, f"get_act_patch_{name}")
    kept = "hook_resid_pre" if site == "resid_pre" else f"attn.hook_{site}"
    names = [f"blocks.{layer}.{kept}" for layer in range(model.cfg.n_layers)]
    cache = model.run_with_cache(clean, names_filter=names)[1]

    def run(patches: Sequence[Patch]) -> Float[Tensor, "patch"]:
        frame = pd.DataFrame(list(patches), columns=["layer", AXIS.get(site, "head_index")])
        return sweep(
            model,
            corrupted,
            cache,
            lambda logits: metric(logits).mean(),
            index_axis_names=None,
            index_df=frame,
        )

    return run


def two_pass_recipe(
    model: TransformerBridge,
    original: Tensor,
    new: Tensor,
    metric: Callable[[Tensor], Tensor],
    receivers: Sequence[Patch] = (),
) -> Callable[[Sequence[Patch]], Float[Tensor, "patch"]]:
    """Path patching with plain hooks (Wang et al. 2022, appendix B), to the logits or to queries.

    The receivers' queries are patched at the last position.
    """
    layers = range(model.cfg.n_layers)
    names = [f"blocks.{layer}.attn.hook_z" for layer in layers]
    from_original = model.run_with_cache(original, names_filter=names)[1]
    from_new = model.run_with_cache(new, names_filter=names)[1]

    def one(sender: Patch) -> Tensor:
        kept = {}

        def freeze(name: str, layer: int) -> Callable:
            def hook_fn(z: Tensor, hook) -> Tensor:
                z = from_original[name].clone()
                if layer == sender[0]:
                    z[:, :, sender[1]] = from_new[name][:, :, sender[1]]
                return z

            return hook_fn

        def keep(layer: int) -> Callable:
            return lambda q, hook: kept.update({layer: q.clone()})

        def put(layer: int, head: int) -> Callable:
            def hook_fn(q: Tensor, hook) -> Tensor:
                q = q.clone()
                q[:, -1, head] = kept[layer][:, -1, head]
                return q

            return hook_fn

        hooks = [(name, freeze(name, layer)) for layer, name in enumerate(names)]
        hooks += [(f"blocks.{la}.attn.hook_q", keep(la)) for la in {la for la, _ in receivers}]
        logits = model.run_with_hooks(original, fwd_hooks=hooks)
        if receivers:
            hooks = [(f"blocks.{la}.attn.hook_q", put(la, head)) for la, head in receivers]
            logits = model.run_with_hooks(original, fwd_hooks=hooks)
        return metric(logits).mean()

    return lambda senders: torch.stack([one(sender) for sender in senders])


def hugging_face_loop(
    hf: PreTrainedModel,
    clean: Tensor,
    corrupted: Tensor,
    metric: Callable[[Tensor], Tensor],
    site: str,
) -> Callable[[Sequence[Patch]], Float[Tensor, "patch"]]:
    """The same patches by a forward hook on a module of a Llama or GPT-2 model."""
    d_head = hf.config.hidden_size // hf.config.num_attention_heads
    recorded = _record(hf, clean, site)

    def one(patch: Patch) -> Tensor:
        layer, index = patch
        start = _offset(hf, site) + index * d_head
        where = (slice(None), index) if site == "resid_pre" else (..., slice(start, start + d_head))

        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[where] = recorded[layer][where]
            return x

        with _hooked(hf, layer, site, edit):
            return metric(hf(corrupted).logits).mean()

    return lambda patches: torch.stack([one(patch) for patch in patches])


def hugging_face_ablation(
    hf: PreTrainedModel, metric: Callable[[Tensor], Tensor], tokens: Tensor
) -> Callable[[Sequence[Patch]], Float[Tensor, "patch"]]:
    """Each head's output set to its mean over prompts and positions, by a hook before W_O."""
    d_head = hf.config.hidden_size // hf.config.num_attention_heads
    recorded = _record(hf, tokens, "z")

    def one(patch: Patch) -> Tensor:
        layer, head = patch
        columns = slice(head * d_head, (head + 1) * d_head)

        def edit(x: Tensor) -> Tensor:
            x = x.clone()
            x[..., columns] = recorded[layer][:, 1:, columns].mean((0, 1))  # without the start
            return x

        with _hooked(hf, layer, "z", edit):
            return metric(hf(tokens).logits).mean()

    return lambda patches: torch.stack([one(patch) for patch in patches])


def _record(hf: PreTrainedModel, tokens: Tensor, site: str) -> dict[int, Tensor]:
    """The site in every layer, from one run."""
    recorded: dict[int, Tensor] = {}
    with ExitStack() as hooks:
        for layer in range(hf.config.num_hidden_layers):
            keep = partial(recorded.setdefault, layer)
            hooks.enter_context(_hooked(hf, layer, site, keep))
        hf(tokens, logits_to_keep=1)
    return recorded


def _offset(hf: PreTrainedModel, site: str) -> int:
    """GPT-2 computes queries, keys and values side by side."""
    return "qkv".find(site) * hf.config.hidden_size if _is_gpt2(hf) and site in "qkv" else 0


def _is_gpt2(hf: PreTrainedModel) -> bool:
    return hf.config.model_type == "gpt2"


@contextmanager
def _hooked(
    hf: PreTrainedModel, layer: int, site: str, edit: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """`edit` on what a block is given, on what W_O is given, or on what a projection gives."""
    block = (hf.transformer.h if _is_gpt2(hf) else hf.model.layers)[layer]
    if site in "qkv":
        module = block.attn.c_attn if _is_gpt2(hf) else getattr(block.self_attn, f"{site}_proj")
        handle = module.register_forward_hook(lambda _, args, out: edit(out))
    else:
        output = block.attn.c_proj if _is_gpt2(hf) else block.self_attn.o_proj
        module = block if site == "resid_pre" else output
        handle = module.register_forward_pre_hook(lambda _, args: (edit(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()
