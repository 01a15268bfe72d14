"""Run a circuit alone, and say how well it stands for the whole model.

A circuit is plain data (`utils.roles`): role -> heads, each role at its position. To run it, the
output z of every head at every position that is no node of it is replaced by its mean over the ABC
distribution, template by template; MLPs and embeddings are left alone (Wang et al. 2022, section
2.1). F is the logit difference, M the model, C the circuit; C - K and M - K are without the
nodes K.
"""

from collections.abc import Mapping, Set
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.heads import Head
from utils.ioi import IOIPrompts
from utils.masks import Means, abc_means, keep_mask, masked_logit_diffs, mean_ablation_mask_hooks
from utils.metrics import Estimate, estimate
from utils.roles import (
    PAPER_CIRCUIT,
    ROLE_POSITIONS,
    Circuit,
    Node,
    nodes,
    precision_recall,
    random_circuits,
    select_heads,
)

__all__ = [
    "PAPER_CIRCUIT",
    "ROLE_POSITIONS",
    "Circuit",
    "Faithfulness",
    "Node",
    "abc_means",
    "completeness",
    "faithfulness",
    "keep_mask",
    "mean_ablation_mask_hooks",
    "minimality",
    "nodes",
    "precision_recall",
    "random_circuits",
    "run_circuit",
    "run_knockout",
    "select_heads",
]


class Faithfulness(NamedTuple):
    """F(C) / F(M), and the paper's distance |F(M) - F(C)| in logits."""

    ratio: Estimate
    gap: Estimate


@torch.no_grad()
def run_circuit(
    model: TransformerBridge, prompts: IOIPrompts, means: Means, kept: Set[Node]
) -> Float[Tensor, "prompt"]:
    """F(C): logit difference with every node but `kept` mean-ablated (`abc_means`)."""
    return masked_logit_diffs(model, prompts, means, [~keep_mask(model, prompts, kept)])[0]


@torch.no_grad()
def run_knockout(
    model: TransformerBridge, prompts: IOIPrompts, means: Means, removed: Set[Node]
) -> Float[Tensor, "prompt"]:
    """F(M - K): logit difference of the full model with the nodes `removed` mean-ablated."""
    return masked_logit_diffs(model, prompts, means, [keep_mask(model, prompts, removed)])[0]


def faithfulness(circuit: Float[Tensor, "prompt"], model: Float[Tensor, "prompt"]) -> Faithfulness:
    """Mean F(C) over mean F(M), and |mean F(M) - mean F(C)| (Wang et al. 2022, section 4).

    The standard error of the ratio r is by the delta method: that of F(C) - r F(M), over the mean
    of F(M). Raises ValueError when the shapes differ or F(M) has mean zero.
    """
    if circuit.ndim != 1 or circuit.shape != model.shape:
        raise ValueError(
            f"circuit and model must both be [prompt], got {tuple(circuit.shape)} "
            f"and {tuple(model.shape)}"
        )
    whole = model.float().mean().item()
    if abs(whole) < 1e-6:
        raise ValueError("model: the mean logit difference is zero, nothing to be faithful to")
    ratio = circuit.float().mean().item() / whole
    error = estimate(circuit - ratio * model).stderr / abs(whole)
    gap = estimate(model - circuit)
    return Faithfulness(Estimate(ratio, error, len(model)), gap._replace(mean=abs(gap.mean)))


@torch.no_grad()
def completeness(
    model: TransformerBridge,
    prompts: IOIPrompts,
    means: Means,
    circuit: Circuit,
    role_positions: Mapping[str, str] = ROLE_POSITIONS,
) -> dict[str, tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]]]:
    """Per role G: F(C - G) and F(M - G), and under "none" F(C) and F(M) (section 4.1).

    A complete circuit moves as the model does when the same nodes are knocked out of both.
    """
    kept = nodes(circuit, role_positions)
    groups = {"none": set()} | {
        role: nodes({role: heads}, role_positions) for role, heads in circuit.items()
    }
    masks = [keep_mask(model, prompts, group) for group in groups.values()]
    outside = ~keep_mask(model, prompts, kept)
    in_circuit = masked_logit_diffs(model, prompts, means, [outside | mask for mask in masks])
    in_model = masked_logit_diffs(model, prompts, means, masks)
    return dict(zip(groups, zip(in_circuit, in_model, strict=True), strict=True))


@torch.no_grad()
def minimality(
    model: TransformerBridge,
    prompts: IOIPrompts,
    means: Means,
    circuit: Circuit,
    role_positions: Mapping[str, str] = ROLE_POSITIONS,
) -> dict[Node, Float[Tensor, "prompt"]]:
    """Per node v of the circuit: F(C - K) - F(C - K - v), what v adds (section 4.2).

    The paper picks K for each head by hand. Here K is empty or the rest of v's role, whichever
    shows the larger mean change: heads of a role stand in for each other.
    """
    role_of: dict[Node, set[Node]] = {}
    for role, heads in circuit.items():
        group = nodes({role: heads}, role_positions)
        for head in heads:
            role_of.setdefault((Head(*head), role_positions[role]), group)
    outside = ~keep_mask(model, prompts, set(role_of))
    removed = [frozenset()] + [
        frozenset(k) for v, role in role_of.items() for k in ({v}, role - {v}, role)
    ]
    removed = list(dict.fromkeys(removed))
    masks = [outside | keep_mask(model, prompts, k) for k in removed]
    f = dict(zip(removed, masked_logit_diffs(model, prompts, means, masks), strict=True))
    result = {}
    for v, role in role_of.items():
        alone = f[frozenset()] - f[frozenset({v})]
        after_the_rest = f[frozenset(role - {v})] - f[frozenset(role)]
        result[v] = max(alone, after_the_rest, key=lambda change: change.mean().abs())
    return result
