"""Activation patching: run the corrupted prompts with one activation taken from the clean run.

Only what a patch can change is run again (`utils.engine.replay`); the results are those of
`transformer_lens.patching`, one value per prompt.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm
from transformer_lens.model_bridge import TransformerBridge

from utils.engine.replay import Metric, Replay
from utils.heads import Head
from utils.metrics import last_position_hooks, logit_diff
from utils.prompts import check_tokens

SITES = ("z", "q", "k", "v", "pattern")
SUBLAYERS = ("resid_pre", "attn_out", "mlp_out")


class LogitDiff:
    """`metrics.logit_diff` with these answers, as a metric for sweeps: [prompt 2], right and wrong.

    It reads two columns of the unembedding, so that a sweep need not compute the others: in a
    small model they are a large part of the work. Raises ValueError for answers of another shape.
    """

    def __init__(self, answers: Int[Tensor, "prompt 2"]):
        if answers.ndim != 2 or answers.shape[1] != 2:
            raise ValueError(f"answers must have shape [prompt 2], got {tuple(answers.shape)}")
        self.answers = answers

    def __call__(self, logits: Float[Tensor, "prompt pos vocab"]) -> Float[Tensor, "prompt"]:
        return logit_diff(logits, self.answers)

    def of_normed(
        self, model: TransformerBridge, normed: Float[Tensor, "copy prompt read d_model"]
    ) -> Float[Tensor, "copy prompt"]:
        """The same from what the unembedding reads, the final residual stream after `ln_final`."""
        right, wrong = self.answers.to(normed.device).unbind(1)
        direction = model.W_U[:, right] - model.W_U[:, wrong]
        offset = model.b_U[right] - model.b_U[wrong]
        return torch.einsum("cpd,dp->cp", normed[:, :, -1], direction) + offset


@torch.no_grad()
def patch_residual(
    model: TransformerBridge,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    metric: Metric,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "prompt layer pos"]:
    """The metric with the residual stream before each layer patched at each position.

    One intervention per cell. `metric` gets the logits of the last position alone,
    [prompt 1 vocab]. Default: all positions and layers. Raises ValueError for prompts that differ
    in shape, for positions or layers out of range, and for a metric that is not one per prompt.
    """
    return patch_sublayer(model, clean, corrupted, metric, "resid_pre", positions, layers)


@torch.no_grad()
def patch_sublayer(
    model: TransformerBridge,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    metric: Metric,
    site: str,
    positions: Sequence[int] | None = None,
    layers: Sequence[int] | None = None,
) -> Float[Tensor, "prompt layer pos"]:
    """As `patch_residual`, for the output of each attention ("attn_out") or MLP ("mlp_out").

    Raises ValueError also for another site, and for "mlp_out" in a model without MLPs.
    """
    check_pair(model, clean, corrupted)
    n_layers, n_positions = model.cfg.n_layers, clean.shape[1]
    layers = list(range(n_layers)) if layers is None else list(layers)
    positions = list(range(n_positions)) if positions is None else list(positions)
    _check_range("layers", layers, n_layers)
    _check_range("positions", positions, n_positions)
    names = [f"blocks.{layer}.hook_{site}" for layer in layers]
    if site not in SUBLAYERS or names[0] not in model.hook_dict:
        raise ValueError(f"site must be one of {SUBLAYERS} that the model has, got {site!r}")
    with model.hooks(fwd_hooks=last_position_hooks()):
        cache = model.run_with_cache(clean, names_filter=names)[1]
    recorded = Replay(model, corrupted)
    unpatched = recorded.measure(metric, [])[0]
    values = unpatched[:, None, None].repeat(1, len(layers), len(positions))
    changed = (clean != corrupted).cumsum(1).any(0)
    column = torch.arange(n_positions, device=corrupted.device).expand_as(corrupted)
    for index, pos in enumerate(tqdm(positions, desc="patching", leave=False)):
        if not changed[pos]:  # left of the first difference both runs are the same
            continue
        start = recorded.first_position(column == pos)

        def patch(name: str, pos=pos, start=start) -> Callable:
            def hook_fn(activation: Tensor, hook) -> Tensor:
                activation = activation.clone()
                activation[:, pos - start] = cache[name][:, pos]
                return activation

            return hook_fn

        patches = [[(name, patch(name))] for name in names]
        values[:, :, index] = recorded.sweep(metric, patches, start).T
    return values


@torch.no_grad()
def patch_heads(
    model: TransformerBridge,
    clean: Int[Tensor, "prompt pos"],
    corrupted: Int[Tensor, "prompt pos"],
    metric: Metric,
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
    check_pair(model, clean, corrupted)
    n_heads = n_site_heads(model, site)
    every = product(range(model.cfg.n_layers), range(n_heads))
    chosen = _check_site_heads(model, every if heads is None else heads, site)
    recorded = Replay(model, corrupted)
    start = recorded.first_position(clean != corrupted)
    names = sorted({_hook_name(head, site) for head in chosen})
    from_clean = recorded.activations_of(clean, names, start)
    patches = [_patch(from_clean, head, site) for head in chosen]
    values = recorded.sweep(metric, patches, start, desc="patching").T
    return values if heads is not None else values.unflatten(1, (model.cfg.n_layers, n_heads))


def patch_head_hooks(
    model: TransformerBridge,
    cache: Mapping[str, Tensor],
    heads: Iterable[tuple[int, int]],
    site: str = "z",
) -> list[tuple[str, Callable]]:
    """Hooks that put these heads' activations from `cache` in place, all of them at once.

    Sites and heads as in `patch_heads`; `cache` comes from `cache_heads(model, clean, [site])`.
    Raises ValueError for an unknown site or head, or one that is not in the cache.
    """
    by_layer = defaultdict(list)
    for layer, head in _check_site_heads(model, heads, site):
        by_layer[f"blocks.{layer}.attn.hook_{site}"].append(head)
    missing = [name for name in by_layer if name not in cache]
    if missing:
        raise ValueError(f"cache lacks {missing[0]}")
    dim = _head_dim(site)

    def hook_for(name: str, chosen: list[int]) -> Callable:
        index = torch.tensor(chosen, device=cache[name].device)
        stored = cache[name].index_select(dim, index)
        return lambda activation, hook: activation.index_copy(dim, index, stored)

    return [(name, hook_for(name, chosen)) for name, chosen in by_layer.items()]


def _patch(from_clean: Mapping[str, Tensor], head: Head, site: str) -> list[tuple[str, Callable]]:
    """A hook that puts one head's clean activation in place."""
    name, dim = _hook_name(head, site), _head_dim(site)

    def hook_fn(activation: Tensor, hook) -> Tensor:
        activation = activation.clone()
        activation.select(dim, head.head).copy_(from_clean[name].select(dim, head.head))
        return activation

    return [(name, hook_fn)]


def _hook_name(head: Head, site: str) -> str:
    return f"blocks.{head.layer}.attn.hook_{site}"


def _head_dim(site: str) -> int:
    """Patterns are [prompt head dest src], the other sites [prompt pos head d_head]."""
    return 1 if site == "pattern" else 2


def n_site_heads(model: TransformerBridge, site: str) -> int:
    """How many heads a site has in each layer: fewer for grouped keys and values."""
    if site not in SITES:
        raise ValueError(f"site must be one of {SITES}, got {site!r}")
    grouped = getattr(model.cfg, "n_key_value_heads", None) if site in ("k", "v") else None
    return grouped or model.cfg.n_heads


def _check_site_heads(
    model: TransformerBridge, heads: Iterable[tuple[int, int]], site: str
) -> list[Head]:
    n_heads, chosen = n_site_heads(model, site), [Head(*head) for head in heads]
    if not chosen:
        raise ValueError("heads is empty, give at least one head")
    for head in chosen:
        if not (0 <= head.layer < model.cfg.n_layers and 0 <= head.head < n_heads):
            raise ValueError(
                f"no head {head} at site {site!r}: {model.cfg.n_layers} layers of {n_heads}"
            )
    return chosen


def check_pair(model: TransformerBridge, clean: Tensor, corrupted: Tensor) -> None:
    check_tokens(model, clean, "clean")
    check_tokens(model, corrupted, "corrupted")
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"clean and corrupted must have one shape, got {tuple(clean.shape)} "
            f"and {tuple(corrupted.shape)}"
        )


def _check_range(name: str, values: list[int], size: int) -> None:
    if not values or min(values) < 0 or max(values) >= size:
        raise ValueError(f"{name} must be one or more of 0..{size - 1}, got {values}")
