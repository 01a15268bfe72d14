"""Which nodes make up a circuit: by what each adds on the way from none to all, or by search.

With a dial m for every head at every position, z becomes m z + (1 - m) mean: all dials at 0 is the
empty circuit, all at 1 the model. Turned up together from 0 to 1, each dial's slope, summed up on
the way, is what its node adds (integrated gradients over a node mask: Sundararajan et al. 2017; for
circuits, Hanna et al. 2024). The attributions add up to F(M) - F(empty).

A search asks for less and costs more: add the node that brings the circuit nearest to the model, or
remove the one that takes it least far away, and again (after Wang et al. 2022, appendix M).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_count
from utils.circuit import (
    Node,
    Nodes,
    check_means,
    check_prompts,
    knock_out,
    logit_diffs,
    node_mask,
    outside,
)
from utils.edits import Run, hook_name, hooks
from utils.engine.memory import check_cache
from utils.engine.packs import check_gradient
from utils.heads import Head
from utils.ioi import IOIPrompts
from utils.metrics import last_position_hooks, logit_diff
from utils.typed import checked

DIALS = 5  # more bring the sum of attributions closer to F(M) - F(empty)
BATCH = 16  # prompts at a time: the gradient keeps every activation


@checked
def node_attribution(
    model: TransformerBridge, prompts: IOIPrompts, means: Run
) -> Float[Tensor, "prompt layer pos head"]:
    """What every head at every position adds to the logit difference of each prompt.

    `means` as for `circuit.run_circuit` (`circuit.means_run`). The slope is taken at
    `DIALS` places on the way. Raises ValueError for means that do not fit; MemoryError if what the
    gradient keeps takes over 80 % of the free memory.
    """
    check_means(model, prompts, means)
    check_gradient(model, prompts.tokens[:BATCH])
    parts = []
    for first in tqdm(range(0, len(prompts.tokens), BATCH), desc="node attribution", leave=False):
        rows = slice(first, first + BATCH)
        usual = {n: m[rows] if len(m) > 1 else m for n, m in means.activations.items()}
        tokens, answers = prompts.tokens[rows], prompts.answers[rows]
        dials = [(step + 0.5) / DIALS for step in range(DIALS)]
        slopes = [_slopes(model, tokens, answers, usual, dial) for dial in dials]
        parts.append(torch.stack(slopes).mean(0))
    return torch.cat(parts)


@checked
def named_nodes(
    attribution: Float[Tensor, "prompt layer pos head"], prompts: IOIPrompts
) -> dict[Node, Float[Tensor, "prompt"]]:
    """The attributions by node, at the named places of each prompt alone.

    Raises ValueError for attributions of other prompts.
    """
    check_prompts(prompts)
    if attribution.shape[::2] != prompts.tokens.shape:
        got, want = list(attribution.shape), list(prompts.tokens.shape)
        raise ValueError(f"attribution is of shape {got}, the prompts of shape {want}")
    prompt = torch.arange(len(attribution))
    n_layers, n_heads = attribution.shape[1], attribution.shape[3]
    return {
        Node(Head(layer, head), place): attribution[prompt, layer, at.cpu(), head]
        for place, at in prompts.positions.items()
        for layer in range(n_layers)
        for head in range(n_heads)
    }


@torch.no_grad()
@checked
def each_added(
    model: TransformerBridge,
    prompts: IOIPrompts,
    means: Run,
    kept: Nodes,
    candidates: Sequence[tuple[Head, str]],
) -> Float[Tensor, "candidate prompt"]:
    """F(C + v) for each candidate v: the circuit `kept` with one node more.

    A node of layer 5 computes its z from layers 0 to 4, which are those of the circuit whether it
    is in or not. So one run of the circuit, read before the means are put in, has what every
    candidate would write; each is then a patch. Raises as `logit_diffs`, and ValueError for no
    candidates; MemoryError if what they would write takes over 80 % of the free memory.
    """
    base = outside(model, prompts, means, kept)
    check_means(model, prompts, means)
    _check_candidates(model, prompts, candidates)
    unablated: dict[str, Tensor] = {}

    def keep(z: Tensor, hook) -> None:
        unablated[hook.name] = z

    names = [hook_name(layer, "z") for layer in range(model.cfg.n_layers)]
    check_cache(model, prompts.tokens, names)
    first = [(name, keep) for name in names]  # each called before the edit at the same place
    model.run_with_hooks(prompts.tokens, fwd_hooks=[*first, *hooks(base), *last_position_hooks()])
    live = Run(unablated)
    restored = [knock_out(model, prompts, live, {node}) for node in candidates]
    return logit_diffs(model, prompts, restored, base=base)


@checked
def each_removed(
    model: TransformerBridge,
    prompts: IOIPrompts,
    means: Run,
    kept: Nodes | None,
    candidates: Sequence[tuple[Head, str]],
    removed: Nodes = frozenset(),
) -> Float[Tensor, "candidate prompt"]:
    """F(C - K - v) for each candidate v, with K `removed`; of the whole model if `kept` is None.

    Raises as `logit_diffs`, and ValueError for no candidates.
    """
    node_mask(model, prompts, removed)  # raises for nodes that are none
    _check_candidates(model, prompts, candidates)
    if kept is None:
        base = knock_out(model, prompts, means, removed)
    else:
        base = outside(model, prompts, means, kept - removed)
    without = [knock_out(model, prompts, means, {node}) for node in candidates]
    return logit_diffs(model, prompts, without, base=base)


class Step(NamedTuple):
    """A node chosen, and the figure that it was chosen by, with the choice made.

    The figure is a `distance`, or in `worst_set` a gap in logits.
    """

    node: Node
    figure: float


@checked
def distance(
    f_circuit: Float[Tensor, "*n prompt"], f_model: Float[Tensor, "prompt"]
) -> Float[Tensor, "*n"]:
    """Mean over the prompts of `|F(C) - F(M)|`, as a share of the mean F(M), which is not 0."""
    if f_model.mean().abs() < 1e-6:
        raise ValueError("f_model: the mean logit difference is zero, there is no share of it")
    return (f_circuit - f_model).abs().mean(-1) / f_model.mean().abs()


@checked
def forward_search(
    model: TransformerBridge,
    prompts: IOIPrompts,
    means: Run,
    candidates: Sequence[tuple[Head, str]],
    n_steps: int,
    start: Nodes = frozenset(),
) -> list[Step]:
    """From `start` up: nodes in the order of adding, each the one that brings F(C) nearest to F(M).

    Nodes that do nothing but together are not found in this way: start with some of them. Raises
    as `each_added`, and ValueError for fewer than one step.
    """
    check_count("n_steps", n_steps)
    check_means(model, prompts, means)
    _check_candidates(model, prompts, candidates)
    node_mask(model, prompts, start)  # raises for nodes that are none
    f_model = logit_diffs(model, prompts, [[]])[0]
    kept, added = set(start), []
    while len(added) < n_steps and (left := [node for node in candidates if node not in kept]):
        far = distance(each_added(model, prompts, means, kept, left), f_model)
        added.append(Step(left[int(far.argmin())], far.min().item()))
        kept.add(added[-1].node)
    return added


@checked
def backward_search(
    model: TransformerBridge,
    prompts: IOIPrompts,
    means: Run,
    candidates: Sequence[tuple[Head, str]],
    n_left: int,
) -> list[Step]:
    """From all candidates down: nodes in the order of removing, each the one missed least.

    Raises as `forward_search`.
    """
    check_count("n_left", n_left, least=0)
    check_means(model, prompts, means)
    _check_candidates(model, prompts, candidates)
    f_model = logit_diffs(model, prompts, [[]])[0]
    kept, removed = set(candidates), []
    while len(kept) > n_left:
        left = [node for node in candidates if node in kept]
        far = distance(each_removed(model, prompts, means, kept, left), f_model)
        removed.append(Step(left[int(far.argmin())], far.min().item()))
        kept.remove(removed[-1].node)
    return removed


@checked
def worst_set(
    model: TransformerBridge, prompts: IOIPrompts, means: Run, kept: Nodes, n_steps: int
) -> list[Step]:
    """Nodes of the circuit whose knock-out tells circuit and model apart most, one after another.

    Each adds most to `|mean F(C - K) - mean F(M - K)|`, in logits (section 4.1: the paper's greedy
    search, which tries a random few at each step).
    """
    check_count("n_steps", n_steps)
    removed: list[Step] = []
    while len(removed) < min(n_steps, len(kept)):
        gone = {step.node for step in removed}
        left = sorted(kept - gone)
        in_circuit = each_removed(model, prompts, means, kept, left, gone)
        in_model = each_removed(model, prompts, means, None, left, gone)
        gap = (in_circuit.mean(1) - in_model.mean(1)).abs()
        removed.append(Step(left[int(gap.argmax())], gap.max().item()))
    return removed


def _check_candidates(
    model: TransformerBridge, prompts: IOIPrompts, candidates: Sequence[tuple[Head, str]]
) -> None:
    if not candidates:
        raise ValueError("candidates is empty, give at least one node")
    node_mask(model, prompts, set(candidates))  # raises for nodes that are none


def _slopes(
    model: TransformerBridge,
    tokens: Int[Tensor, "prompt pos"],
    answers: Int[Tensor, "prompt 2"],
    usual: dict[str, Tensor],
    dial: float,
) -> Float[Tensor, "prompt layer pos head"]:
    """d F / d m of every node with all dials here."""
    layers = range(model.cfg.n_layers)
    shape = (len(layers), *tokens.shape, model.cfg.n_heads, 1)
    dials = torch.full(shape, dial, device=tokens.device, requires_grad=True)

    def turn(layer: int):
        mean = usual[hook_name(layer, "z")]
        return lambda z, hook: mean + dials[layer] * (z - mean)

    with torch.enable_grad():
        turned = [(hook_name(layer, "z"), turn(layer)) for layer in layers]
        logits = model.run_with_hooks(tokens, fwd_hooks=turned)
        total = logit_diff(logits[:, -1:], answers).sum()
        (slopes,) = torch.autograd.grad(total, dials)
    return slopes[..., 0].movedim(0, 1).cpu()
