"""Ablation: take what heads write away (zero), or put their usual output in its place (mean).

An ablation is a list of edits (`utils.edits`): `heads_from(model, heads, 0.0)`, or with a mean run
or another run in place of the 0. What is here: the mean run, ablation that leaves attention as it
was, the loss under many ablations at once, and the heads to compare with.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import TypeVar
from weakref import ref

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_count, check_tokens, generator_of, indices
from utils.edits import Edit, Run, heads_from, record, sweep
from utils.heads import Head, all_heads, as_heads, check_heads
from utils.metrics import TokenLoss, token_batches
from utils.typed import checked

Name = TypeVar("Name", bound=Hashable)


@checked
@torch.no_grad()
def mean_run(
    model: TransformerBridge, tokens: Int[Tensor, "prompt pos"], per_position: bool = True
) -> Run:
    """The mean output z of every head over prompts: at each position, or over positions too.

    The mean over positions leaves out the first, whose output is unlike all others. Activations are
    [1 pos head d_head], pos = 1 for a mean over positions. Raises as `check_tokens`, and ValueError
    for a mean over the positions of prompts of one token.
    """
    check_tokens(model, tokens, folded=True)
    if not per_position and tokens.shape[1] < 2:
        raise ValueError("tokens: a mean over positions needs 2 or more, got prompts of one token")
    total: dict[str, Tensor] = {}
    for batch in token_batches(model, tokens):
        for name, z in record(model, batch, ["z"]).activations.items():
            total[name] = total.get(name, 0) + z.sum(0, keepdim=True)
    means = {name: z / len(tokens) for name, z in total.items()}
    if not per_position:
        means = {name: z[:, 1:].mean(1, keepdim=True) for name, z in means.items()}
    return Run(means, model=ref(model))


@checked
def pattern_preserving(
    model: TransformerBridge, heads: Iterable[tuple[int, int]], patterns: Run
) -> list[Edit]:
    """Zero ablation in which no head attends differently for it (Olsson et al. 2022, appendix).

    `patterns` is `record(model, tokens, ["pattern"])` on the same prompts. They are forced in the
    ablated layers and above; below nothing changes. Raises ValueError as `heads_from`; a sweep of
    the edits does for patterns of other prompts.
    """
    heads = check_heads(model, heads)
    zero = heads_from(model, heads, 0.0)
    lowest = min(head.layer for head in heads)
    above = [head for head in all_heads(model) if head.layer >= lowest]
    kept = heads_from(model, above, patterns, "pattern")
    # where they are known, a sweep sees to it that the patterns are of its own prompts
    known = patterns.tokens is not None
    return [*(edit._replace(same_prompts=known) for edit in kept), *zero]


@checked
def losses(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    interventions: Mapping[Name, Sequence[Edit]],
    columns: Sequence[int] | None = None,
) -> dict[Name, Float[Tensor, "prompt pos-1"]]:
    """Loss in nats of predicting each token but the first, under each list of edits.

    `columns` are those of the loss to compute (column i is about token i + 1); the others are nan,
    and cost no unembedding. Raises ValueError for a column out of range, and as `sweep`.
    """
    check_tokens(model, tokens, folded=True)
    n_columns = tokens.shape[1] - 1
    columns = indices("columns", range(n_columns) if columns is None else columns, n_columns)
    loss = TokenLoss(tokens[:, [column + 1 for column in columns]])
    edits = list(interventions.values())
    # the loss in column i is read at position i
    found = sweep(model, tokens, loss, edits, read=columns, desc="ablating")
    result = found.new_full((len(found), len(tokens), n_columns), math.nan)
    result[:, :, columns] = found
    return dict(zip(interventions, result, strict=True))


@checked
def random_control(
    model: TransformerBridge,
    heads: Iterable[tuple[int, int]],
    n_draws: int,
    seed: int = 0,
    exclude: Iterable[tuple[int, int]] = (),
) -> list[list[Head]]:
    """Draws of as many other heads in the same layers, to compare an ablation with.

    `exclude` names heads that are not to be drawn either, such as weaker heads of the same kind.
    Raises ValueError for fewer than one draw, and when a layer has too few heads left.
    """
    heads = check_heads(model, heads, distinct=True)
    check_count("n_draws", n_draws)
    wanted = Counter(head.layer for head in heads)
    exclude = as_heads(exclude, "exclude")
    taken = {*heads, *(check_heads(model, exclude, name="exclude") if exclude else [])}
    left = [head for head in all_heads(model) if head not in taken]
    others = {layer: [head for head in left if head.layer == layer] for layer in wanted}
    for layer, n in wanted.items():
        if len(others[layer]) < n:
            raise ValueError(f"layer {layer} has {len(others[layer])} other heads, {n} are wanted")
    generator = generator_of(seed)

    def draw(layer: int) -> list[Head]:
        order = torch.randperm(len(others[layer]), generator=generator)
        return [others[layer][i] for i in order[: wanted[layer]].tolist()]

    return [[head for layer in wanted for head in draw(layer)] for _ in range(n_draws)]


@checked
def control_sizes(
    model: TransformerBridge, ranked: Sequence[tuple[int, int]], sizes: Iterable[int]
) -> list[int]:
    """The sizes k for which `random_control` finds a control of ranked[:k] outside all of `ranked`.

    There is none for more heads than are ranked. Raises ValueError as `check_heads`.
    """
    ranked = check_heads(model, ranked, name="ranked", distinct=True)
    most = 2**31  # any whole number may be asked for
    sizes = [k for k in indices("sizes", sizes, most) if k <= len(ranked)]
    room = Counter(head.layer for head in all_heads(model) if head not in ranked)
    # no layer wants more heads than it has left
    return [k for k in sizes if Counter(head.layer for head in ranked[:k]) <= room]
