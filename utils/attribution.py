"""Attribution: which component writes the answer (exact), and which one matters (by gradient)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import pandas as pd
import torch
from einops import rearrange, reduce
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import direct_logit_attribution as tl_logit_attribution

from utils.checks import check_range, check_tokens
from utils.edits import check_sweep, hook_name, record
from utils.engine.memory import check_cache
from utils.engine.packs import check_gradient
from utils.heads import as_heads, check_heads
from utils.metrics import LogitDiff, last_position_hooks, token_batches
from utils.typed import checked


class Attribution(NamedTuple):
    """One value per prompt and component, with the components' names."""

    labels: list[str]
    values: Float[Tensor, "prompt component"]


@torch.no_grad()
@checked
def direct_logit_attribution(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], answers: Int[Tensor, "prompt 2"]
) -> Attribution:
    """What each component writes to logit(right) - logit(wrong) at the last position.

    Components are the embedding, positional embedding (if any), every layer's attention and MLP
    output, and the bias b_U of the unembedding. The last LayerNorm divides each prompt's residual
    stream by one number: every component is divided by that same number (and centred, where the
    norm centres), so the values add up to the logit difference (before the model caps its logits,
    as Gemma 2 does). Raises ValueError for answers outside the vocabulary and for a model that
    is not in compatibility mode; tokens as `check_tokens`. MemoryError if what is kept takes over
    80 % of the free memory.
    """
    cache = _at_the_end(model, tokens, answers, ["hook_attn_out", "hook_mlp_out"])
    written = tl_logit_attribution(model, None, *answers.T, cache=cache)  # None: no second run
    bias = model.b_U[answers[:, :1]] - model.b_U[answers[:, 1:]]
    return Attribution([*written.labels, "b_U"], torch.cat([written.attribution.T, bias], dim=1))


@torch.no_grad()
@checked
def head_projections(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    heads: Iterable[tuple[int, int]],
    answers: Int[Tensor, "prompt k"],
) -> Float[Tensor, "prompt k n_heads"]:
    """What each of some heads writes at the last position to the logit of each of k answers.

    With `attention_at` the axes of figure 3c of Wang et al. 2022. The last LayerNorm is treated as
    in `direct_logit_attribution`: a layer's heads and its bias b_O add up to its attention output
    there. Raises likewise, and ValueError for heads the model lacks, or whose sum it normalises
    (Gemma 2).
    """
    rows = [layer * model.cfg.n_heads + head for layer, head in check_heads(model, heads)]
    cache = _at_the_end(model, tokens, answers, ["attn.hook_z"])
    written = cache.stack_head_results(pos_slice=-1)[rows]
    columns = [cache.logit_attrs(written, answer, pos_slice=-1) for answer in answers.T]
    return rearrange(columns, "k head prompt -> prompt k head")


@checked
def of_heads(
    values: Float[Tensor, "prompt layer head"], heads: Iterable[tuple[int, int]]
) -> Float[Tensor, "prompt n_heads"]:
    """The values of some heads, in their order. ValueError for none, or heads without a value."""
    layer, head = torch.tensor(as_heads(heads), dtype=torch.int64).reshape(-1, 2).T
    check_range("heads' layers", layer, values.shape[1])
    check_range("heads", head, values.shape[2])
    return values[:, layer, head]


@checked
def attention_at(
    patterns: Float[Tensor, "prompt layer head dest src"],
    heads: Iterable[tuple[int, int]],
    dest: Int[Tensor, "prompt"],
    source: Int[Tensor, "prompt"],
) -> Float[Tensor, "prompt n_heads"]:
    """Attention of some heads from one place of each prompt to another, say from END to IO.

    `patterns` are those of `heads.attention_patterns`, `dest` and `source` one position a prompt.
    Raises ValueError for no heads, and for heads or positions that are not in the patterns.
    """
    check_range("dest", dest, patterns.shape[3])
    check_range("source", source, patterns.shape[4])
    between = patterns[torch.arange(len(patterns)), :, :, dest, source]  # [prompt layer head]
    return of_heads(between, heads)


@checked
def attention_table(
    patterns: Float[Tensor, "prompt layer head dest src"],
    positions: Mapping[str, Int[Tensor, "prompt"]],
    heads: Sequence[tuple[int, int]],
    dest: str,
    sources: Sequence[str],
    least: float = 0.0,
) -> pd.DataFrame:
    """Mean attention of some heads (rows) from one named place of the prompts to others (columns).

    The last column, `looks at`, is the place that a head attends to most, or "-" where that is less
    than `least`. Raises ValueError as `attention_at`, for no sources, and for a place that has no
    position.
    """
    if not sources:
        raise ValueError("sources is empty, give at least one place")
    if lacking := {dest, *sources} - set(positions):
        raise ValueError(f"positions: no {sorted(lacking)[0]!r} among {list(positions)}")
    heads = as_heads(heads)
    to = {s: attention_at(patterns, heads, positions[dest], positions[s]) for s in sources}
    mean = {place: attention.mean(0).tolist() for place, attention in to.items()}
    table = pd.DataFrame(mean, index=[str(head) for head in heads])
    most = table.idxmax(axis=1)
    table = table.round(3)
    return table.assign(**{"looks at": most.where(table.max(axis=1) >= least, "-")})


@checked
def attribution_patching(
    model: TransformerBridge,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    metric: Callable,
) -> Float[Tensor, "prompt layer head"]:
    """Estimated change of the metric, had each head's output in the corrupted run been the clean.

    (clean - corrupted z) times the gradient of the metric on the corrupted run, summed over
    positions: two forward passes and a backward one for all heads at once, and a straight-line
    guess at what `utils.patching` measures (Nanda 2023, "Attribution patching"). `metric` gets the
    logits of the last position, [prompt 1 vocab]. Raises ValueError for prompts that differ in
    shape, and a metric that is not one differentiable value per prompt; tokens as `check_tokens`.
    MemoryError if what the gradient keeps takes over 80 % of the free memory.
    """
    check_sweep(model, {"clean": clean, "corrupted": corrupted}, metric)
    check_gradient(model, corrupted)
    with torch.no_grad():
        wanted = torch.stack(list(record(model, clean, ["z"]).activations.values()))
    found: list[Float[Tensor, "prompt pos head d_head"]] = []

    def keep(z: Tensor, hook) -> Tensor:
        found.append(z)
        return z

    kept = [(hook_name(layer, "z"), keep) for layer in range(model.cfg.n_layers)]
    # a gradient for the embedding, so that all that follows has one, frozen weights or not
    kept += [("hook_embed", lambda embedding, hook: embedding.requires_grad_())]
    with torch.enable_grad(), model.hooks(fwd_hooks=kept + last_position_hooks()):
        values = metric(model(corrupted))
        shape = tuple(values.shape)
        if shape != (len(corrupted),) or not values.requires_grad:
            raise ValueError(f"metric must give differentiable [prompt] values, got shape {shape}")
        # prompts do not mix, so the gradient of the sum holds each prompt's own
        gradients = torch.autograd.grad(values.sum(), found)
    effect = (wanted - torch.stack(found).detach()) * torch.stack(gradients)
    return reduce(effect, "layer prompt pos head d_head -> prompt layer head", "sum")


def _at_the_end(
    model: TransformerBridge, tokens: Tensor, answers: Tensor, sites: list[str]
) -> ActivationCache:
    """Every layer's `sites` at the last position, [prompt 1 ...], once `answers` is checked."""
    check_tokens(model, tokens, folded=True)  # the last LayerNorm's weights are in W_U
    if "attn.hook_z" in sites and getattr(model.blocks[0], "ln1_post", None) is not None:
        raise ValueError("model: its heads do not write to the residual stream one by one")
    check_range("answers", answers, model.cfg.d_vocab)
    if answers.shape[1] == 2:
        LogitDiff(answers)  # raises where right and wrong are one
    # a model has some of these only: those it lacks are not in the cache
    names = ["hook_embed", "hook_pos_embed", "ln_final.hook_scale"]
    names += [f"blocks.{layer}.{site}" for layer in range(model.cfg.n_layers) for site in sites]
    # what heads write is taken apart: a stream for each head of a layer
    times = model.cfg.n_heads if "attn.hook_z" in sites else 1
    check_cache(model, tokens[:, -1:], names * times)
    parts = []
    for batch in token_batches(model, tokens):
        with model.hooks(fwd_hooks=last_position_hooks()):
            run = model.run_with_cache(batch, names_filter=names, pos_slice=(-1, None))
        parts.append(run[1].cache_dict)
    return ActivationCache({name: torch.cat([p[name] for p in parts]) for name in parts[0]}, model)
