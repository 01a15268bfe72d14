"""Attention heads: their names, and scores that read what a head does off its patterns.

A site is a hook point that every layer has. Those of heads: "q", "k", "v" (queries, keys, values),
"pattern" (attention, from each destination to the sources) and "z" (the values that a head has
gathered by its attention, before W_O writes them to the residual stream).
"""

import inspect
from collections.abc import Callable, Iterable
from functools import partial
from operator import index
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_model, check_tokens
from utils.engine.memory import check_cache
from utils.metrics import last_position_hooks, token_batches
from utils.typed import BadArgument, checked, kind_of

HEAD_SITES = ("z", "q", "k", "v", "pattern")


class Head(NamedTuple):
    """One attention head; prints as "L5H1" (the papers' 5.1)."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"

    @classmethod
    def from_label(cls, label: str) -> "Head":
        """The head that prints as this. ValueError for other text."""
        layer, _, head = str(label).removeprefix("L").partition("H")
        if f"L{layer}H{head}" != label or not (layer.isdecimal() and head.isdecimal()):
            raise ValueError(f"label: got {label!r}, want one such as 'L5H1'")
        return cls(int(layer), int(head))


@checked
def n_site_heads(model: TransformerBridge, site: str = "z") -> int:
    """Heads of a layer at a site: fewer for "k" and "v" where query heads share keys and values.

    Raises ValueError for a site other than "z", "q", "k", "v" and "pattern".
    """
    if site not in HEAD_SITES:
        raise ValueError(f"site must be one of {HEAD_SITES}, got {site!r}")
    grouped = getattr(model.cfg, "n_key_value_heads", None) if site in ("k", "v") else None
    return grouped or model.cfg.n_heads


def as_heads(
    heads: Iterable[tuple[int, int]], name: str = "heads", distinct: bool = False
) -> list[Head]:
    """Pairs as heads; ValueError for one that is not two whole numbers.

    Where each is counted, they must be `distinct`: ValueError for one that comes twice.
    """
    try:
        chosen = [Head(index(layer), index(head)) for layer, head in heads]
    except (TypeError, ValueError):
        wanted = "a list of (layer, head), such as [(5, 1)]"
        raise BadArgument(f"{name} must be {wanted}; got {kind_of(heads)}") from None
    if distinct and len(set(chosen)) < len(chosen):
        raise ValueError(f"{name} has {max(chosen, key=chosen.count)} twice")
    return chosen


@checked
def check_heads(
    model: TransformerBridge,
    heads: Iterable,
    site: str = "z",
    name: str = "heads",
    distinct: bool = False,
) -> list[Head]:
    """The heads as a list of `Head`; ValueError if there are none or the model lacks one there.

    And as `as_heads` and `check_model`.
    """
    check_model(model)
    chosen = as_heads(heads, name, distinct)
    if not chosen:
        raise ValueError(f"{name} is empty, give at least one head")
    n_layers, n_heads = model.cfg.n_layers, n_site_heads(model, site)
    for head in chosen:
        if not (0 <= head.layer < n_layers and 0 <= head.head < n_heads):
            has = f"{n_layers} layers of {n_heads} heads"
            raise ValueError(f"{name}: no head {head} at {site!r}: {has}")
    return chosen


@checked
def all_heads(model: TransformerBridge, site: str = "z") -> list[Head]:
    """Every head of the model at a site, layer by layer."""
    layers, heads = range(model.cfg.n_layers), range(n_site_heads(model, site))
    return [Head(layer, head) for layer in layers for head in heads]


@checked
def key_value_head(model: TransformerBridge, head: tuple[int, int]) -> Head:
    """The key/value head that a query head reads; under grouped keys several share one."""
    layer, query = check_heads(model, [head], name="head")[0]
    return Head(layer, query * n_site_heads(model, "k") // model.cfg.n_heads)


# `checked` refuses nan; these take it: a pattern with gaps has a score of nan, which shows
of_patterns = partial(checked, gaps_in=("pattern",))


@of_patterns
def previous_token_score(pattern: Float[Tensor, "*rest dest src"]) -> Float[Tensor, "*rest"]:
    """Mean attention to the token just before, over every position but the first."""
    _check_pattern(pattern)
    return pattern.diagonal(-1, dim1=-2, dim2=-1).mean(-1)


@of_patterns
def duplicate_token_score(
    pattern: Float[Tensor, "*rest dest src"], seq_len: int
) -> Float[Tensor, "*rest"]:
    """Mean attention from a token to itself one copy earlier (patterns on `repeated_tokens`)."""
    return _stripe(pattern, seq_len, seq_len)


@of_patterns
def induction_score(
    pattern: Float[Tensor, "*rest dest src"], seq_len: int
) -> Float[Tensor, "*rest"]:
    """Mean attention from a token to the one after its last copy (`seq_len - 1` back).

    Patterns are on `repeated_tokens`; the mean is over the positions of the later copies.
    """
    return _stripe(pattern, seq_len, seq_len - 1)


@of_patterns
def prefix_matching_score(
    pattern: Float[Tensor, "prompt *rest pos pos"], tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt *rest"]:
    """Attention to the tokens that follow earlier copies of the present token.

    Summed over all earlier copies and averaged over the positions that have one (Olsson et al.
    2022, appendix: 25 random tokens, repeated 4 times, start token in front). Raises ValueError
    when a prompt repeats no token.
    """
    after_copy = _after_earlier_copy(tokens.to(pattern.device))
    n_dest = after_copy.any(-1).sum(-1)  # [prompt]
    if (n_dest == 0).any():
        raise ValueError("tokens: a prompt has no repeated token, so nothing to match")
    ones = [1] * (pattern.ndim - 3)  # the axes between prompt and dest
    mask = after_copy.reshape(len(tokens), *ones, *after_copy.shape[1:])
    return (pattern * mask).sum((-2, -1)) / n_dest.reshape(-1, *ones)


@checked
@torch.no_grad()
def attention_patterns(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"]
) -> Float[Tensor, "prompt layer head dest src"]:
    """Every attention pattern; large, so meant for a few short prompts. Raises as `score_heads`."""
    return score_heads(model, tokens, lambda pattern: pattern)


@checked
@torch.no_grad()
def score_heads(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], score: Callable, **kwargs
) -> Float[Tensor, "prompt layer head *rest"]:
    """Score every head on its own attention patterns, per prompt, batch by batch.

    `score(pattern, **kwargs)` is one of the functions above, or like them; one that takes `tokens`
    is handed those of its batch. Raises as `check_tokens`, ValueError for a `seq_len` that is not
    the length at which the tokens repeat, and MemoryError for patterns that do not fit.
    """
    # what the stripe scores take
    if "seq_len" in kwargs:
        check_tokens(model, tokens)
        _check_repeats(tokens, kwargs["seq_len"])
    wants_tokens = "tokens" in inspect.signature(score).parameters
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(model.cfg.n_layers)]
    scores = []
    for batch in token_batches(model, tokens):
        check_cache(model, batch, names)
        with model.hooks(fwd_hooks=last_position_hooks()):  # the logits are not wanted
            cache = model.run_with_cache(batch, names_filter=names)[1]
        extra = {**kwargs, "tokens": batch} if wants_tokens else kwargs
        by_layer = [score(cache[name], **extra) for name in names]
        found = {tuple(getattr(one, "shape", ())[:2]) for one in by_layer}
        if found != {(len(batch), model.cfg.n_heads)}:
            raise ValueError(f"score must give [prompt head ...] values, got {found}")
        scores.append(torch.stack(by_layer, dim=1))
    return torch.cat(scores)


@checked
def top_heads(
    scores: Float[Tensor, "layer head"], k: int | None = None, threshold: float | None = None
) -> list[Head]:
    """Heads by falling score: the best `k`, those at or above `threshold`, or both."""
    if scores.numel() == 0:
        raise ValueError(f"scores is empty: shape {list(scores.shape)}")
    if k is None and threshold is None:
        raise ValueError("give k, threshold or both")
    if k is not None and not 1 <= k <= scores.numel():
        raise ValueError(f"k must be between 1 and {scores.numel()}, got {k}")
    values, order = scores.flatten().sort(descending=True, stable=True)
    if threshold is not None:
        order = order[values >= threshold]
    return [Head(int(i) // scores.shape[1], int(i) % scores.shape[1]) for i in order[:k]]


@checked
def _check_repeats(tokens: Int[Tensor, "prompt pos"], seq_len: int) -> None:
    body = tokens[:, 1:]
    lengths = range(1, body.shape[1] // 2 + 1)
    length = next((n for n in lengths if torch.equal(body[:, n:], body[:, :-n])), None)
    if length != seq_len:
        repeat = "do not repeat" if length is None else f"repeat every {length}"
        raise ValueError(f"seq_len={seq_len}, but after the first the tokens {repeat}")


def _check_pattern(pattern: Tensor) -> None:
    if pattern.shape[-1] != pattern.shape[-2] or pattern.shape[-1] < 2:
        raise ValueError(f"pattern must have shape [... dest src], got {tuple(pattern.shape)}")


def _stripe(pattern: Tensor, seq_len: int, back: int) -> Float[Tensor, "*rest"]:
    """Mean attention `back` positions back, over the copies after the first."""
    _check_pattern(pattern)
    n_copies, left_over = divmod(pattern.shape[-1] - 1, max(seq_len, 1))
    if seq_len < 2 or left_over or n_copies < 2:
        raise ValueError(
            f"pattern over {pattern.shape[-1]} positions is not a start token and two or more "
            f"copies of seq_len={seq_len} (at least 2) tokens"
        )
    # element i of the diagonal is destination position back + i
    stripe = pattern.diagonal(-back, dim1=-2, dim2=-1)
    return stripe[..., 1 + seq_len - back :].mean(-1)


def _after_earlier_copy(tokens: Int[Tensor, "prompt pos"]) -> Bool[Tensor, "prompt dest src"]:
    """True where the token before `src` equals the token at `dest` and comes earlier."""
    same = (tokens[:, :, None] == tokens[:, None, :]).tril(-1)
    return torch.nn.functional.pad(same[:, :, :-1], (1, 0))
