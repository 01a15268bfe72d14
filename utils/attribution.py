"""Attribution: which component writes the answer (exact), and which one matters (by gradient)."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens import ActivationCache
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.tools.analysis import direct_logit_attribution as by_component

from utils.heads import Head, all_heads, check_heads
from utils.metrics import last_position_hooks, token_batches
from utils.patching import Metric, check_pair
from utils.prompts import check_tokens

HEAD_SITES = ("z", "q", "k", "v")
RESIDUAL_SITES = ("resid_pre", "attn_out", "mlp_out")


class Attribution(NamedTuple):
    """One value per prompt and component, with the components' names."""

    labels: list[str]
    values: Float[Tensor, "prompt component"]


@torch.no_grad()
def direct_logit_attribution(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], answers: Int[Tensor, "prompt 2"]
) -> Attribution:
    """What each component writes to logit(right) - logit(wrong) at the last position.

    Components are the embedding, positional embedding (if any), every layer's attention and MLP
    output, and the bias b_U of the unembedding. The last LayerNorm divides each prompt's residual
    stream by one number: every component is divided by that same number (and centred, where the
    norm centres), so the values add up to the logit difference (before the model squashes its
    logits, if it does). Raises ValueError for answers of another shape or outside the vocabulary
    and for a model that is not in compatibility mode; tokens as `check_tokens`.
    """
    _check(model, tokens, answers)
    layers = range(model.cfg.n_layers)
    # a model has some of the embeddings and of the sublayers: those it lacks are not in the cache
    names = ["hook_embed", "hook_pos_embed"]
    names += [f"blocks.{layer}.hook_{out}" for layer in layers for out in ("attn_out", "mlp_out")]
    values = []
    for batch, pair in _batches(model, tokens, answers):
        written = by_component(
            model,
            answer_tokens=pair[:, 0],
            incorrect_tokens=pair[:, 1],
            cache=_cache(model, batch, names),
        )
        values.append(torch.cat([written.attribution.T, _bias(model, pair)], dim=1))
    return Attribution([*written.labels, "b_U"], torch.cat(values))


@torch.no_grad()
def logit_lens(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], answers: Int[Tensor, "prompt 2"]
) -> Attribution:
    """The logit difference at the last position if the model stopped early.

    The residual stream before each layer ("3_pre"), between its attention and its MLP ("3_mid";
    not in models where the two run in parallel or that have no MLP) and at the end ("final_post")
    goes through the unembedding. The last LayerNorm keeps the scale of the full run, as in the
    TransformerLens demos, so the steps between neighbours are `direct_logit_attribution`.
    Raises as `direct_logit_attribution`.
    """
    _check(model, tokens, answers)
    layers = range(model.cfg.n_layers)
    has_mid = "blocks.0.hook_resid_mid" in model.hook_dict
    names = [f"blocks.{layer}.hook_resid_{at}" for layer in layers for at in ("pre", "mid", "post")]
    values = []
    for batch, pair in _batches(model, tokens, answers):
        cache = _cache(model, batch, names)
        stack, labels = cache.accumulated_resid(incl_mid=has_mid, pos_slice=-1, return_labels=True)
        values.append(_logit_diff(cache, stack, pair).T + _bias(model, pair))
    return Attribution(labels, torch.cat(values))


@torch.no_grad()
def head_attribution(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], answers: Int[Tensor, "prompt 2"]
) -> Float[Tensor, "prompt layer head"]:
    """What each head writes to logit(right) - logit(wrong) at the last position.

    A layer's heads, plus its bias b_O, add up to its attention output in
    `direct_logit_attribution`, which says how the last LayerNorm is treated. Raises likewise, and
    ValueError for a model that normalises the sum of a layer's heads (Gemma 2).
    """
    _check(model, tokens, answers)
    values = []
    for batch, pair in _batches(model, tokens, answers):
        cache, written = _head_outputs(model, batch, all_heads(model))
        values.append(_logit_diff(cache, written, pair).T)
    return torch.cat(values).unflatten(1, (model.cfg.n_layers, model.cfg.n_heads))


@torch.no_grad()
def head_projections(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    heads: Iterable[tuple[int, int]],
    targets: Int[Tensor, "prompt k"],
) -> Float[Tensor, "prompt k head"]:
    """What each head writes at the last position to the logit of each of k tokens.

    With `attention_to` the axes of figure 3c of Wang et al. 2022. The last LayerNorm is treated
    as in `direct_logit_attribution`; raises as `head_attribution`, and for heads the model lacks.
    """
    heads = check_heads(model, heads)
    _check_model(model)
    check_tokens(model, tokens)
    _check_columns("targets", targets, tokens, model.cfg.d_vocab)
    values = []
    for batch, chosen in _batches(model, tokens, targets):
        cache, written = _head_outputs(model, batch, heads)
        columns = [cache.logit_attrs(written, column, pos_slice=-1) for column in chosen.T]
        values.append(torch.stack(columns).permute(2, 0, 1))
    return torch.cat(values)


@torch.no_grad()
def attention_to(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    heads: Iterable[tuple[int, int]],
    positions: Int[Tensor, "prompt k"],
) -> Float[Tensor, "prompt k head"]:
    """Attention of each head from the last position to k positions of its prompt.

    Raises ValueError for heads the model lacks, positions of another shape or out of range;
    tokens as `check_tokens`.
    """
    heads = check_heads(model, heads)
    check_tokens(model, tokens)
    _check_columns("positions", positions, tokens, tokens.shape[1])
    values = []
    for batch, sources in _batches(model, tokens, positions):
        names = {f"blocks.{head.layer}.attn.hook_pattern" for head in heads}
        cache = _cache(model, batch, sorted(names))
        rows = torch.stack([cache["pattern", layer][:, head, -1] for layer, head in heads], dim=-1)
        values.append(rows.gather(1, sources[..., None].expand(-1, -1, len(heads))))
    return torch.cat(values)


def attribution_patching(
    model: TransformerBridge,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    metric: Metric,
    site: str = "z",
) -> Float[Tensor, "prompt layer place"]:
    """Estimated change of the metric, had each activation of the corrupted run been the clean one.

    (clean - corrupted activation) times the gradient of the metric on the corrupted run: one
    forward and one backward pass for all patches at once, and a straight-line guess at what
    `utils.patching` measures (Nanda 2023, "Attribution patching"). `site` "z", "q", "k", "v" gives
    [prompt layer head], summed over positions (key/value heads for "k" and "v"); "resid_pre",
    "attn_out", "mlp_out" give [prompt layer pos]. `metric` gets the logits of the last position,
    [prompt 1 vocab]. Raises ValueError for an unknown site, prompts that differ in shape, and a
    metric that is not one differentiable value per prompt.
    """
    names = _site_names(model, site)
    check_pair(model, clean, corrupted)
    with torch.no_grad():
        wanted = _cache(model, clean, names)
    found: dict[str, Tensor] = {}
    zeros: dict[str, Tensor] = {}

    def add_zero(activation: Tensor, hook, name: str) -> Tensor:
        # the gradient of an added zero is the activation's, and needs no parameter's gradient
        found[name] = activation.detach()
        zeros[name] = torch.zeros_like(found[name], requires_grad=True)
        return activation + zeros[name]

    hooks = [(name, partial(add_zero, name=name)) for name in names] + last_position_hooks()
    with torch.enable_grad(), _frozen(model), model.hooks(fwd_hooks=hooks):
        values = metric(model(corrupted))
        if values.shape != (len(corrupted),) or not values.requires_grad:
            raise ValueError(
                f"metric must give differentiable [prompt] values, got shape {tuple(values.shape)}"
            )
        # prompts do not mix, so the gradient of the sum holds each prompt's own
        gradients = torch.autograd.grad(values.sum(), [zeros[name] for name in names])
    per_layer = [
        ((wanted[name] - found[name]) * gradient).sum((1, 3) if site in HEAD_SITES else -1)
        for name, gradient in zip(names, gradients, strict=True)
    ]
    return torch.stack(per_layer, dim=1)


@contextmanager
def _frozen(model: TransformerBridge) -> Iterator[None]:
    """Without gradients for the parameters, which would hold on to memory; restored after."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _site_names(model: TransformerBridge, site: str) -> list[str]:
    if site not in HEAD_SITES + RESIDUAL_SITES:
        raise ValueError(f"site must be one of {HEAD_SITES + RESIDUAL_SITES}, got {site!r}")
    inside = "attn.hook_" if site in HEAD_SITES else "hook_"
    names = [f"blocks.{layer}.{inside}{site}" for layer in range(model.cfg.n_layers)]
    if names[0] not in model.hook_dict:
        raise ValueError(f"site {site!r}: this model has no {names[0]}")
    return names


def _cache(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], names: Sequence[str]
) -> ActivationCache:
    """Run once and keep these activations and the last LayerNorm's scale."""
    with model.hooks(fwd_hooks=last_position_hooks()):
        return model.run_with_cache(tokens, names_filter=[*names, "ln_final.hook_scale"])[1]


def _head_outputs(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], heads: list[Head]
) -> tuple[ActivationCache, Float[Tensor, "head prompt d_model"]]:
    """A run's cache, and what each head writes at the last position."""
    if getattr(model.blocks[0], "ln1_post", None) is not None:
        raise ValueError("model: its heads do not write to the residual stream one by one")
    layers = sorted({head.layer for head in heads})
    cache = _cache(model, tokens, [f"blocks.{layer}.attn.hook_z" for layer in layers])
    written = [cache["z", la][:, -1, h] @ model.blocks[la].attn.W_O[h] for la, h in heads]
    return cache, torch.stack(written)


def _logit_diff(
    cache: ActivationCache,
    stack: Float[Tensor, "component prompt d_model"],
    answers: Int[Tensor, "prompt 2"],
) -> Float[Tensor, "component prompt"]:
    return cache.logit_attrs(stack, answers[:, 0], answers[:, 1], pos_slice=-1)


def _bias(model: TransformerBridge, answers: Int[Tensor, "prompt 2"]) -> Float[Tensor, "prompt 1"]:
    bias = model.b_U[answers]
    return bias[:, :1] - bias[:, 1:]


def _batches(
    model: TransformerBridge, tokens: Tensor, columns: Tensor
) -> list[tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch k"]]]:
    """Prompts and what belongs to them, in batches that fit in memory."""
    batches = token_batches(model, tokens)
    columns = columns.to(model.cfg.device)
    return list(zip(batches, columns.split(len(batches[0])), strict=True))


def _check(model: TransformerBridge, tokens: Tensor, answers: Tensor) -> None:
    _check_model(model)
    check_tokens(model, tokens)
    _check_columns("answers", answers, tokens, model.cfg.d_vocab, width=2)


def _check_model(model: TransformerBridge) -> None:
    if not model.compatibility_mode:
        raise ValueError(
            "model must be in compatibility mode (call enable_compatibility_mode()): "
            "the last LayerNorm's weights belong in the unembedding"
        )


def _check_columns(
    name: str, columns: Tensor, tokens: Tensor, size: int, width: int | None = None
) -> None:
    """Raise unless `columns` is [prompt k] of integers in 0..size - 1."""
    want = f"[{len(tokens)} {width or 'k'}]"
    if columns.ndim != 2 or len(columns) != len(tokens) or width not in (None, columns.shape[1]):
        raise ValueError(f"{name} must have shape {want}, got {list(columns.shape)}")
    if columns.is_floating_point() or columns.numel() == 0:
        raise ValueError(f"{name} must be integers, one at least, got {columns.dtype} {want}")
    if columns.min() < 0 or columns.max() >= size:
        raise ValueError(
            f"{name} must lie in 0..{size - 1}, got {int(columns.min())}..{int(columns.max())}"
        )
