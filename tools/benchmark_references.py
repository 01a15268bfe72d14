"""What the benchmark compares with: TransformerLens's own loops, and a plain Hugging Face loop.

Each function takes a list of patches, runs the model once for each (twice for a path), and gives
one value per patch.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import pandas as pd
import torch
from torch import Tensor
from transformer_lens import patching
from transformer_lens.model_bridge import TransformerBridge
from transformers import PreTrainedModel

from tools.benchmark_timing import Patch, Sweep

Metric = Callable[[Tensor], Tensor]  # logits -> one value per prompt


def transformer_lens_loop(
    model: TransformerBridge, clean: Tensor, corrupted: Tensor, metric: Metric, site: str
) -> Sweep:
    """`transformer_lens.patching`: "resid_pre" by position, or "z", "q", "k", "v" by head."""
    name = "resid_pre" if site == "resid_pre" else f"attn_head_{site.replace('z', 'out')}_all_pos"
    sweep = getattr(patching, f"get_act_patch_{name}")
    kept = "hook_resid_pre" if site == "resid_pre" else f"attn.hook_{site}"
    names = [f"blocks.{layer}.{kept}" for layer in range(model.cfg.n_layers)]
    cache = model.run_with_cache(clean, names_filter=names)[1]

    def run(patches: Sequence[Patch]) -> Tensor:
        index = "pos" if site == "resid_pre" else "head_index"
        frame = pd.DataFrame(list(patches), columns=["layer", index])
        options = {"index_axis_names": None, "index_df": frame}
        return sweep(model, corrupted, cache, lambda logits: metric(logits).mean(), **options)

    return run


def two_pass_recipe(
    model: TransformerBridge,
    original: Tensor,
    new: Tensor,
    metric: Metric,
    receivers: Sequence[Patch] = (),
) -> Sweep:
    """Path patching with plain hooks (Wang et al. 2022, appendix B), to the logits or to queries.

    The receivers' queries are patched at the last position.
    """
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.cfg.n_layers)]
    from_original = model.run_with_cache(original, names_filter=names)[1]
    from_new = model.run_with_cache(new, names_filter=names)[1]

    def freeze(z: Tensor, hook, name: str, head: int | None) -> Tensor:
        z = from_original[name].clone()
        if head is not None:
            z[:, :, head] = from_new[name][:, :, head]
        return z

    def put(q: Tensor, hook, kept: Tensor, head: int) -> Tensor:
        q = q.clone()
        q[:, -1, head] = kept[:, -1, head]
        return q

    def one(sender: Patch) -> Tensor:
        kept: dict[int, Tensor] = {}
        hooks = [
            (name, partial(freeze, name=name, head=sender[1] if layer == sender[0] else None))
            for layer, name in enumerate(names)
        ]
        for layer, _ in receivers:
            keep = partial(lambda q, hook, layer: kept.update({layer: q.clone()}), layer=layer)
            hooks.append((f"blocks.{layer}.attn.hook_q", keep))
        logits = model.run_with_hooks(original, fwd_hooks=hooks)
        if receivers:
            hooks = [
                (f"blocks.{layer}.attn.hook_q", partial(put, kept=kept[layer], head=head))
                for layer, head in receivers
            ]
            logits = model.run_with_hooks(original, fwd_hooks=hooks)
        return metric(logits).mean()

    return lambda senders: torch.stack([one(sender) for sender in senders])


def hugging_face_loop(
    hf: PreTrainedModel,
    clean: Tensor,
    corrupted: Tensor,
    metric: Metric,
    site: str,
    mean: bool = False,
) -> Sweep:
    """The same patches by a forward hook on a module of a Llama or GPT-2 model.

    `mean`: each is the clean run's mean over prompts and positions, without the start token.
    """
    d_head = hf.config.hidden_size // hf.config.num_attention_heads
    recorded = _record(hf, clean, site)
    if mean:
        recorded = {i: x[:, 1:].mean((0, 1)).expand_as(x) for i, x in recorded.items()}

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
