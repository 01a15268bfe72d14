"""A circuit as plain data: role -> heads. The rule that fills the roles, and what to compare with.

A role does its work at one position of the prompt; a head at a position is a node.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.heads import Head, all_heads, check_heads

Circuit = dict[str, list[Head]]
Node = tuple[Head, str]

# Where each role does its work: Wang et al. 2022, figure 2. The last four are not the paper's:
# heads that act on the logits, but look at S (and lower it, or copy it) or at END itself.
ROLE_POSITIONS = {
    "previous_token": "S1+1",
    "duplicate_token": "S2",
    "induction": "S2",
    "s_inhibition": "END",
    "name_mover": "END",
    "negative_name_mover": "END",
    "backup_name_mover": "END",
    "subject_suppressor": "END",
    "subject_mover": "END",
    "amplifier": "END",
    "damper": "END",
}

# The 26 heads of GPT-2 small: Wang et al. 2022, figure 2.
PAPER_CIRCUIT: Circuit = {
    role: [Head(*map(int, name.split("."))) for name in names.split()]
    for role, names in {
        "previous_token": "2.2 4.11",
        "duplicate_token": "0.1 0.10 3.0",
        "induction": "5.5 5.8 5.9 6.9",
        "s_inhibition": "7.3 7.9 8.6 8.10",
        "name_mover": "9.6 9.9 10.0",
        "negative_name_mover": "10.7 11.10",
        "backup_name_mover": "9.0 9.7 10.1 10.2 10.6 10.10 11.2 11.9",
    }.items()
}


def select_heads(
    effects: Float[Tensor, "prompt layer head"], threshold: float, sign: int, n_errors: float = 3
) -> list[Head]:
    """Heads whose mean effect has this sign and exceeds the threshold, largest first.

    The mean must also be more than `n_errors` standard errors away from zero. Raises ValueError
    for fewer than two prompts, a negative threshold, or a sign that is neither +1 nor -1.
    """
    if effects.ndim != 3 or len(effects) < 2:
        raise ValueError(
            f"effects must be [prompt layer head], 2 or more prompts, got {tuple(effects.shape)}"
        )
    if sign not in (1, -1):
        raise ValueError(f"sign must be +1 or -1, got {sign!r}")
    if threshold < 0:
        raise ValueError(f"threshold is a size and must not be negative, got {threshold}")
    mean = sign * effects.mean(0)
    stderr = effects.std(0) / math.sqrt(len(effects))
    chosen = ((mean > threshold) & (mean > n_errors * stderr)).nonzero().tolist()
    return [Head(*head) for head in sorted(chosen, key=lambda at: -mean[tuple(at)].item())]


def precision_recall(
    found: Iterable[tuple[int, int]], published: Iterable[tuple[int, int]]
) -> tuple[float, float]:
    """Share of the found heads that are published, and of the published that are found.

    Precision is nan when nothing was found. Raises ValueError when nothing is published.
    """
    found, published = {tuple(h) for h in found}, {tuple(h) for h in published}
    if not published:
        raise ValueError("published is empty, want the heads to compare with")
    both = len(found & published)
    return both / len(found) if found else math.nan, both / len(published)


def nodes(circuit: Circuit, role_positions: Mapping[str, str] = ROLE_POSITIONS) -> set[Node]:
    """Every (head, position name) of a circuit. Raises ValueError for a role without a position."""
    for role in circuit:
        if role not in role_positions:
            raise ValueError(f"circuit: role {role!r} has no position in {dict(role_positions)}")
    return {
        (Head(*head), role_positions[role]) for role, heads in circuit.items() for head in heads
    }


def random_circuits(
    model: TransformerBridge, circuit: Circuit, n_draws: int, seed: int = 0
) -> list[Circuit]:
    """Circuits of the same size, role by role, drawn from the heads that are not in the circuit.

    Raises ValueError for fewer than one draw, and when the model has too few other heads.
    """
    if n_draws < 1:
        raise ValueError(f"n_draws must be at least 1, got {n_draws}")
    sizes = [len(heads) for heads in circuit.values()]
    taken = set(check_heads(model, (head for heads in circuit.values() for head in heads)))
    others = [head for head in all_heads(model) if head not in taken]
    if len(others) < sum(sizes):
        raise ValueError(f"circuit has {sum(sizes)} heads, the model only {len(others)} others")
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Circuit:
        order = torch.randperm(len(others), generator=generator)[: sum(sizes)]
        parts = zip(circuit, order.split(sizes), strict=True)
        return {role: [others[i] for i in part.tolist()] for role, part in parts}

    return [draw() for _ in range(n_draws)]
