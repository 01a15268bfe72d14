"""Ablation: take a head's output away (zero), or put an average or another run's in its place."""

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformer_lens.model_bridge import TransformerBridge

from utils.engine.replay import Metric, Replay
from utils.heads import Head, all_heads, cache_heads, check_heads
from utils.metrics import token_batches

Hooks = Sequence[tuple[str, Callable]]
Name = TypeVar("Name", bound=Hashable)
VOCAB_PART = 2048


def zero_ablation_hooks(heads: Iterable[tuple[int, int]]) -> Hooks:
    """Hooks that set the output z of these heads to zero, at every position."""
    return _replace_hooks(heads, lambda layer, head: 0.0)


def mean_ablation_hooks(
    heads: Iterable[tuple[int, int]], means: Float[Tensor, "layer pos head d_head"]
) -> Hooks:
    """Hooks that set z of these heads to their mean, from `head_means`.

    Means per position (pos = the prompts' length) or one for all positions (pos = 1). Raises
    ValueError for means of another shape, and when the prompts have another length.
    """
    if means.ndim != 4:
        raise ValueError(f"means must be [layer pos head d_head], got {tuple(means.shape)}")
    return _replace_hooks(heads, lambda layer, head: means[None, layer, :, head])


def resample_ablation_hooks(
    heads: Iterable[tuple[int, int]], z: Float[Tensor, "prompt layer pos head d_head"]
) -> Hooks:
    """Hooks that set z of these heads to that of other prompts, from `head_outputs`.

    Raises ValueError for z of another shape, and when the prompts differ in number or length.
    """
    if z.ndim != 5:
        raise ValueError(f"z must be [prompt layer pos head d_head], got {tuple(z.shape)}")
    return _replace_hooks(heads, lambda layer, head: z[:, layer, :, head])


def freeze_pattern_hooks(patterns: Mapping[str, Tensor]) -> Hooks:
    """Hooks that force every stored attention pattern ([prompt head dest src], by hook name).

    `patterns` is a cache of a run on the same prompts. Raises ValueError if it holds no pattern,
    and when the prompts have another shape.
    """
    stored = {name: p for name, p in patterns.items() if name.endswith("attn.hook_pattern")}
    if not stored:
        raise ValueError(f"patterns holds no hook_pattern, got {sorted(patterns)[:3]}")

    def hook_for(frozen: Float[Tensor, "prompt head dest src"]) -> Callable:
        def freeze(pattern: Tensor, hook) -> Tensor:
            if frozen.shape != pattern.shape:
                stored, run = tuple(frozen.shape), tuple(pattern.shape)
                raise ValueError(f"the stored pattern is {stored}, this run's {run}")
            return frozen

        return freeze

    return [(name, hook_for(frozen)) for name, frozen in stored.items()]


def pattern_preserving_hooks(
    patterns: Mapping[str, Tensor], heads: Iterable[tuple[int, int]]
) -> Hooks:
    """Zero ablation in which no head attends differently for it (Olsson et al. 2022, appendix).

    `patterns` comes from `cache_heads(model, tokens, ["pattern"])` on the same prompts. They are
    forced in the ablated layers and above (nothing changes below): what is lost is what the heads
    write to the logits themselves, not what later heads attend to because of it. Raises
    ValueError as `freeze_pattern_hooks` and `zero_ablation_hooks`.
    """
    zero = zero_ablation_hooks(heads)
    lowest = min(int(name.split(".")[1]) for name, _ in zero)
    frozen = freeze_pattern_hooks(patterns)
    return [hook for hook in frozen if int(hook[0].split(".")[1]) >= lowest] + zero


class _TokenLoss:
    """Loss in nats of predicting these tokens, one for each position read: a metric for sweeps."""

    def __init__(self, targets: Int[Tensor, "prompt read"]):
        self.targets = targets

    def __call__(self, logits: Float[Tensor, "prompt read vocab"]) -> Float[Tensor, "prompt read"]:
        targets = self.targets.to(logits.device)
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        return loss.view(targets.shape)

    def of_normed(
        self, model: TransformerBridge, normed: Float[Tensor, "copy prompt read d_model"]
    ) -> Float[Tensor, "copy prompt read"]:
        """The same from the residual stream after `ln_final`, a part of the vocabulary at a time.

        So the logits stay in the processor's cache.
        """
        targets = self.targets.to(normed.device)
        right = (normed * model.W_U.T[targets]).sum(-1) + model.b_U[targets]
        rows, sums = normed.flatten(0, 2), []
        parts = zip(model.W_U.split(VOCAB_PART, 1), model.b_U.split(VOCAB_PART), strict=True)
        for w_u, b_u in parts:
            logits = torch.addmm(b_u, rows, w_u)
            top = logits.amax(-1, keepdim=True)
            # several times faster than torch.logsumexp
            sums.append((logits - top).exp().sum(-1).log() + top[:, 0])
        return torch.stack(sums).logsumexp(0).view(right.shape) - right


@torch.no_grad()
def losses(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    interventions: Mapping[Name, Hooks],
    columns: Sequence[int] | None = None,
) -> dict[Name, Float[Tensor, "prompt pos-1"]]:
    """Loss in nats of predicting each token but the first, under each set of hooks.

    What lies below an intervention is run once for all of them. `columns` are
    those of the loss to compute (column i is about token i + 1); the others are nan, and cost no
    unembedding. Raises ValueError for a column out of range, for no interventions, and as
    `check_tokens`.
    """
    n_columns = tokens.shape[-1] - 1
    columns = list(range(n_columns) if columns is None else columns)
    if not columns or min(columns) < 0 or max(columns) >= n_columns:
        raise ValueError(f"columns must be one or more of 0..{n_columns - 1}, got {columns}")
    if not interventions:
        raise ValueError("interventions is empty, give at least one")
    loss = _TokenLoss(tokens[:, [column + 1 for column in columns]])
    runs = list(interventions.values())
    found = Replay(model, tokens).sweep(loss, runs, desc="ablating", read=columns)
    result = torch.full((len(found), len(tokens), n_columns), math.nan, device=found.device)
    result[:, :, columns] = found
    return dict(zip(interventions, result, strict=True))


@torch.no_grad()
def head_outputs(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt layer pos head d_head"]:
    """The output z of every head, before W_O; large, so meant for short prompts."""
    return torch.cat([_stacked_z(model, batch) for batch in token_batches(model, tokens)])


@torch.no_grad()
def head_means(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], per_position: bool = True
) -> Float[Tensor, "layer pos head d_head"]:
    """Mean output z of every head over prompts, per position or over positions too (pos = 1).

    The mean over positions leaves out the first, whose output is unlike all others.
    """
    total = sum(_stacked_z(model, batch).sum(0) for batch in token_batches(model, tokens))
    means = total / len(tokens)
    return means if per_position else means[:, 1:].mean(1, keepdim=True)


def random_control(
    model: TransformerBridge,
    heads: Iterable[tuple[int, int]],
    n_draws: int,
    seed: int = 0,
    exclude: Iterable[tuple[int, int]] = (),
) -> list[list[Head]]:
    """Draws of as many other heads in the same layers, to compare an ablation with.

    `exclude` names heads that are not to be drawn either, such as weaker heads of the same kind.
    Raises ValueError when a layer has too few heads left.
    """
    heads = check_heads(model, heads)
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, got {n_draws}")
    wanted = Counter(head.layer for head in set(heads))
    taken = set(heads) | {Head(*head) for head in exclude}
    others = {
        layer: [head for head in all_heads(model) if head.layer == layer and head not in taken]
        for layer in wanted
    }
    for layer, n in wanted.items():
        if len(others[layer]) < n:
            raise ValueError(f"layer {layer} has {len(others[layer])} other heads, {n} are wanted")
    generator = torch.Generator().manual_seed(seed)

    def draw(layer: int) -> list[Head]:
        order = torch.randperm(len(others[layer]), generator=generator)
        return [others[layer][i] for i in order[: wanted[layer]].tolist()]

    return [[head for layer in wanted for head in draw(layer)] for _ in range(n_draws)]


@torch.no_grad()
def ablation_sweep(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    metric: Metric,
    hooks_for: Callable[[list[Head]], Hooks] = zero_ablation_hooks,
) -> Float[Tensor, "prompt layer head"]:
    """The metric with each head of the model ablated alone.

    `metric` gets the logits of the last position, [prompt 1 vocab], as in `patching`. For a loss
    use `losses(model, tokens, {head: zero_ablation_hooks([head]) for head in all_heads(model)})`.
    Raises ValueError for a metric that is not one per prompt, and as `check_tokens`.
    """
    hooks = [hooks_for([head]) for head in all_heads(model)]
    values = Replay(model, tokens).sweep(metric, hooks, desc="ablating heads").T
    return values.unflatten(1, (model.cfg.n_layers, model.cfg.n_heads))


def _stacked_z(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt layer pos head d_head"]:
    cache = cache_heads(model, tokens, ["z"])
    return torch.stack([cache["z", layer] for layer in range(model.cfg.n_layers)], dim=1)


def _replace_hooks(
    heads: Iterable[tuple[int, int]], value: Callable[[int, int], float | Tensor]
) -> Hooks:
    """Hooks that set z of each head to `value(layer, head)`: a number or [prompt pos d_head]."""
    by_layer: dict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        by_layer[layer].append(head)
    if not by_layer:
        raise ValueError("heads is empty, give at least one head")
    if min(by_layer) < 0 or min(map(min, by_layer.values())) < 0:
        raise ValueError(f"heads must not be negative, got {dict(by_layer)}")

    def replace(z: Float[Tensor, "prompt pos head d_head"], hook) -> Tensor:
        z = z.clone()
        for head in by_layer[hook.layer()]:
            if head >= z.shape[2]:
                raise ValueError(f"no head {head} in layer {hook.layer()} of {z.shape[2]} heads")
            new = value(hook.layer(), head)
            _check_fits(new, z)
            z[:, :, head] = new
        return z

    return [(f"blocks.{layer}.attn.hook_z", replace) for layer in by_layer]


def _check_fits(new: float | Tensor, z: Float[Tensor, "prompt pos head d_head"]) -> None:
    """Raise unless one value per prompt and position, or one for all, is given."""
    if isinstance(new, float):
        return
    for name, got, want in zip(("prompts", "positions"), new.shape, z.shape, strict=False):
        if got not in (1, want):
            raise ValueError(f"the replacement was taken from {got} {name}, this run has {want}")
