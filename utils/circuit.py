"""A circuit as plain data, run alone, and how well it stands for the whole model.

A circuit is role -> heads, each role at its position of the prompt; a head at a position is a node.
To run it alone, the output z of every other head at every position is replaced by its mean over
the ABC distribution, template by template; MLPs and embeddings are left alone (Wang et al. 2022,
section 2.1). F is the logit difference, M the model, C the circuit; C - K and M - K are without the
nodes K.
"""

import math
from collections.abc import Mapping, Sequence, Set
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils.checks import check_count, check_range, check_tokens, generator_of
from utils.edits import Edit, Run, hook_name, nodes_from, record, sweep
from utils.engine.packs import check_edits
from utils.heads import Head, all_heads, as_heads, check_heads
from utils.ioi import IOIPrompts, NamePrompts
from utils.metrics import Estimate, LogitDiff, estimate, token_batches
from utils.typed import checked, kind_of

Circuit = Mapping[str, Sequence[tuple[int, int]]]
Prompts = IOIPrompts | NamePrompts
PLACES = ("S1", "IO", "S1+1", "S2", "END")  # of a prompt, from left to right, by and large

# Where each role does its work: Wang et al. 2022, figure 2. The last five are not the paper's:
# heads that act on the logits, but look at S (and lower it, or copy it) or at END itself.
ROLE_POSITIONS = {
    "previous_token": "S1+1",
    "duplicate_token": "S2",
    "induction": "S2",
    "s_inhibition": "END",
    "name_mover": "END",
    "negative_name_mover": "END",
    "backup_name_mover": "END",
    "giver_suppressor": "END",
    "s_reader": "END",
    "subject_mover": "END",
    "amplifier": "END",
    "damper": "END",
}


class Node(NamedTuple):
    """A head at a place of the prompt; prints as "L5H1 END"."""

    head: Head
    place: str

    def __str__(self) -> str:
        return f"{self.head} {self.place}"

    @classmethod
    def from_label(cls, label: str) -> "Node":
        """The node that prints as this. ValueError for other text."""
        head, _, place = str(label).partition(" ")
        if place not in PLACES:
            raise ValueError(f"label: got {label!r}, want one such as 'L5H1 END'")
        return cls(Head.from_label(head), place)


Nodes = Set[tuple[Head, str]]  # of `Node`, or of plain pairs


class Faithfulness(NamedTuple):
    """F(C) / F(M), and the paper's distance `|F(M) - F(C)|` in logits."""

    ratio: Estimate
    gap: Estimate


@checked
def select_heads(
    effects: Float[Tensor, "prompt layer head"],
    threshold: float,
    sign: Literal[1, -1],
    groups: Bool[Tensor, "prompt"] | None = None,
) -> list[Head]:
    """Heads whose mean effect has this sign and exceeds the threshold, largest first.

    The mean must also be more than 3 standard errors away from zero. With `groups`, such as one
    order of the names and the other, a head need pass in one of the two alone, and the sign that
    counts is that of the larger mean: what helps in one and hurts in the other cancels over all
    prompts. Raises ValueError for fewer than two prompts (of a group), a negative threshold, or
    another sign.
    """
    if threshold < 0:
        raise ValueError(f"threshold is a size and must not be negative, got {threshold}")
    largest = effects.new_zeros(effects.shape[1:])  # [layer head], of the means that pass
    for part in [effects] if groups is None else [effects[groups], effects[~groups]]:
        if len(part) < 2:
            raise ValueError(f"effects must be of 2 or more prompts, got {len(part)}")
        mean, stderr = part.mean(0), part.std(0) / math.sqrt(len(part))
        passes = (mean.abs() > threshold) & (mean.abs() > 3 * stderr)
        largest = torch.where(passes & (mean.abs() > largest.abs()), mean, largest)
    chosen = [Head(*at) for at in (sign * largest > 0).nonzero().tolist()]
    return sorted(chosen, key=lambda head: -abs(largest[head].item()))


@checked
def nodes(circuit: Circuit) -> set[Node]:
    """Every node of a circuit. Raises ValueError for a role without a position."""
    for role in circuit:
        if role not in ROLE_POSITIONS:
            raise ValueError(f"circuit: role {role!r} has no position in {ROLE_POSITIONS}")
    pairs = {
        role: as_heads(heads, f"circuit[{role!r}]", distinct=True)
        for role, heads in circuit.items()
    }
    return {Node(head, ROLE_POSITIONS[role]) for role, heads in pairs.items() for head in heads}


@checked
def random_circuits(model: TransformerBridge, circuit: Circuit, n_draws: int) -> list[Circuit]:
    """Circuits of the same size, role by role, drawn from the heads that are not in the circuit.

    Raises ValueError for fewer than one draw, and when the model has too few other heads.
    """
    check_count("n_draws", n_draws)
    sizes = [len(heads) for heads in circuit.values()]
    taken = {head for head, _ in nodes(circuit)}
    check_heads(model, taken, name="circuit")
    others = [head for head in all_heads(model) if head not in taken]
    if len(others) < sum(sizes):
        raise ValueError(f"circuit has {sum(sizes)} heads, the model only {len(others)} others")
    generator = generator_of(0)

    def draw() -> Circuit:
        order = torch.randperm(len(others), generator=generator)[: sum(sizes)]
        parts = zip(circuit, order.split(sizes), strict=True)
        return {role: [others[i] for i in part.tolist()] for role, part in parts}

    return [draw() for _ in range(n_draws)]


@checked
def check_prompts(prompts: Prompts, model: TransformerBridge | None = None) -> None:
    """Raise ValueError for tokens, answers or positions that do not fit each other or the model."""
    if model is None:
        check_range("prompts.tokens", prompts.tokens)
    else:
        check_tokens(model, prompts.tokens, "prompts.tokens", folded=True)
    d_vocab = math.inf if model is None else model.cfg.d_vocab
    n_prompts, n_positions = prompts.tokens.shape
    LogitDiff(prompts.answers).check(n_prompts, d_vocab)
    for place, at in prompts.positions.items():
        check_range(f"prompts.positions[{place!r}]", at, n_positions)
        if at.shape != (n_prompts,):
            raise ValueError(f"prompts.positions[{place!r}] must be one for each prompt")
    if isinstance(prompts, IOIPrompts):
        check_range("prompts.template", prompts.template, d_vocab)
        if prompts.template.shape != (n_prompts,):
            raise ValueError("prompts.template must be one for each prompt")


@checked
@torch.no_grad()
def abc_means(
    model: TransformerBridge, prompts: IOIPrompts, site: str = "z"
) -> Float[Tensor, "template layer pos *rest"]:
    """Mean of `site` over the ABC prompts of each template (section 2.1); of z, rest = head d_head.

    Take a larger draw than the prompts that are evaluated, with another seed. A template without
    prompts is nan. Raises as `record`, and ValueError for prompts without an ABC one each.
    """
    check_prompts(prompts, model)
    tokens = prompts.corrupted.get("abc")
    if getattr(tokens, "shape", None) != prompts.tokens.shape:
        have = {name: kind_of(x) for name, x in prompts.corrupted.items()}
        want = f"'abc' prompts of shape {list(prompts.tokens.shape)}"
        raise ValueError(f"prompts.corrupted must have {want}, it has {have}")
    template = prompts.template.to(tokens.device)
    in_template = torch.bincount(template)  # how many prompts
    total: Tensor | float = 0.0
    batches = token_batches(model, tokens)
    for batch, which in zip(batches, template.split([len(b) for b in batches]), strict=True):
        by_layer = list(record(model, batch, [site]).activations.values())
        x = torch.stack(by_layer, dim=1)  # [prompt layer pos *rest]
        total = total + x.new_zeros(len(in_template), *x.shape[1:]).index_add(0, which, x)
    return total / in_template.view(-1, *[1] * (total.ndim - 1))


@checked
def node_mask(
    model: TransformerBridge, prompts: Prompts, nodes: Nodes
) -> Bool[Tensor, "prompt layer pos head"]:
    """True at every node, at that position of each prompt; False at every other.

    Raises ValueError for a head the model lacks or a position the prompts lack, and as
    `check_prompts`.
    """
    check_prompts(prompts, model)
    n_prompts, n_positions = prompts.tokens.shape
    shape = (n_prompts, model.cfg.n_layers, n_positions, model.cfg.n_heads)
    mask = torch.zeros(shape, dtype=torch.bool)
    for head, position in nodes:
        layer, index = check_heads(model, [head], name="nodes")[0]
        if position not in prompts.positions:
            raise ValueError(
                f"nodes: no position {position!r}, prompts have {list(prompts.positions)}"
            )
        mask[torch.arange(n_prompts), layer, prompts.positions[position].cpu(), index] = True
    return mask


@partial(checked, gaps_in=("means",))  # nan where `abc_means` had no prompts
def means_run(
    prompts: IOIPrompts, means: Float[Tensor, "template layer pos *rest"], site: str = "z"
) -> Run:
    """The `abc_means` of each prompt's own template, as a run to take activations from.

    Raises ValueError for means of another length, or that lack a prompt's template.
    """
    check_prompts(prompts)
    template, n_positions = prompts.template.to(means.device), prompts.tokens.shape[1]
    if means.shape[2] != n_positions:
        raise ValueError(f"means are for {means.shape[2]} positions, prompts have {n_positions}")
    has = means.flatten(1).isfinite().all(1)
    lacking = [t for t in template.unique().tolist() if t >= len(has) or not has[t]]
    if lacking:
        raise ValueError(f"means lacks template {lacking}: take them over more prompts")
    layers = range(means.shape[1])
    return Run({hook_name(layer, site): means[template, layer] for layer in layers})


@checked
def knock_out(model: TransformerBridge, prompts: Prompts, means: Run, removed: Nodes) -> list[Edit]:
    """Edits that mean-ablate these nodes."""
    return nodes_from(node_mask(model, prompts, removed), means)


@checked
def outside(model: TransformerBridge, prompts: Prompts, means: Run, kept: Nodes) -> list[Edit]:
    """Edits that mean-ablate all but these nodes: every other head, at every position."""
    return nodes_from(~node_mask(model, prompts, kept), means)


def check_means(model: TransformerBridge, prompts: Prompts, means: Run) -> None:
    """Raise ValueError for means that do not fit the model and the prompts."""
    edits = outside(model, prompts, means, set())
    check_edits(model, prompts.tokens, edits)


@checked
def logit_diffs(
    model: TransformerBridge,
    prompts: Prompts,
    interventions: Sequence[Sequence[Edit]],
    base: Sequence[Edit] = (),
) -> Float[Tensor, "intervention prompt"]:
    """F: the logit difference under each intervention, on top of the edits in `base`."""
    check_prompts(prompts, model)
    metric = LogitDiff(prompts.answers)
    return sweep(model, prompts.tokens, metric, interventions, base, desc="circuits")


@checked
def run_circuit(
    model: TransformerBridge, prompts: Prompts, means: Run, kept: Nodes
) -> Float[Tensor, "prompt"]:
    """F(C): the logit difference with every node but `kept` mean-ablated."""
    # one intervention without edits: the base run itself
    return logit_diffs(model, prompts, [[]], base=outside(model, prompts, means, kept))[0]


@checked
def faithfulness(
    f_circuit: Float[Tensor, "prompt"], f_model: Float[Tensor, "prompt"]
) -> Faithfulness:
    """Mean F(C) over mean F(M), and `|mean F(M) - mean F(C)|` (Wang et al. 2022, section 4).

    The standard error of the ratio r is by the delta method: that of F(C) - r F(M), over the mean
    of F(M). Raises ValueError when F(M) has mean zero.
    """
    whole = f_model.float().mean().item()
    if abs(whole) < 1e-6:
        raise ValueError("f_model: the mean logit difference is zero, nothing to be faithful to")
    ratio = f_circuit.float().mean().item() / whole
    error = estimate(f_circuit - ratio * f_model).stderr / abs(whole)
    gap = estimate(f_model - f_circuit)
    return Faithfulness(Estimate(ratio, error, len(f_model)), gap._replace(mean=abs(gap.mean)))


@checked
def completeness(
    model: TransformerBridge, prompts: Prompts, means: Run, circuit: Circuit
) -> dict[str, tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]]]:
    """Per role G: F(C - G) and F(M - G), and under "none" F(C) and F(M) (section 4.1).

    A complete circuit moves as the model does when the same nodes are knocked out of both.
    """
    groups = [nodes({role: heads}) for role, heads in circuit.items()]
    without = [[], *(knock_out(model, prompts, means, group) for group in groups)]
    kept = outside(model, prompts, means, nodes(circuit))
    in_circuit = logit_diffs(model, prompts, without, base=kept)
    in_model = logit_diffs(model, prompts, without)
    return dict(zip(["none", *circuit], zip(in_circuit, in_model, strict=True), strict=True))


@checked
def gap_by_prompt(
    pairs: Mapping[str, tuple[Float[Tensor, "prompt"], Float[Tensor, "prompt"]]],
) -> Float[Tensor, "prompt"]:
    """How far circuit and model are apart without a role, prompt by prompt, as a share of F(M).

    With d = F(C - G) - F(M - G), the mean over the roles G of `completeness` of d sign(mean d),
    over `|mean F(M)|`: its mean over the prompts is that of `|mean d|`, as in section 4.1.
    nan for a circuit without roles. Raises ValueError for pairs without "none", with
    nan, or of a model whose mean F(M) is 0.
    """
    if "none" not in pairs:
        raise ValueError(f"pairs must have 'none', got {list(pairs)}")
    if not all(f.isfinite().all() for both in pairs.values() for f in both):
        raise ValueError("pairs must be finite, one has nan or infinite values")
    whole = pairs["none"][1].mean().abs()
    if whole == 0:
        raise ValueError("pairs: the model's mean F(M) is 0, nothing to take a share of")
    apart = [c - m for role, (c, m) in pairs.items() if role != "none"]
    if not apart:
        return torch.full_like(pairs["none"][1], torch.nan)
    return torch.stack([gap * gap.mean().sign() for gap in apart]).mean(0) / whole


@checked
def minimality(
    model: TransformerBridge,
    prompts: Prompts,
    means: Run,
    circuit: Circuit,
    choose: Bool[Tensor, "prompt"] | None = None,
) -> dict[Node, Float[Tensor, "prompt"]]:
    """Per node v of the circuit: F(C - K) - F(C - K - v), what v adds (section 4.2).

    The paper picks K for each head by hand. Here K is empty or the rest of v's role, whichever
    shows the larger mean change on the prompts `choose` (default: all): heads of a role stand in
    for each other. Raises ValueError unless `choose` has one for each prompt, and chooses some.
    """
    check_prompts(prompts, model)
    choose = torch.ones(len(prompts.tokens), dtype=torch.bool) if choose is None else choose
    if len(choose) != len(prompts.tokens) or not choose.any():
        raise ValueError(f"choose must choose among {len(prompts.tokens)} prompts, got {choose}")
    role_of: dict[Node, frozenset[Node]] = {}  # each node's role: itself and those beside it
    for role, heads in circuit.items():
        group = frozenset(nodes({role: heads}))
        for head in heads:
            role_of.setdefault(Node(Head(*head), ROLE_POSITIONS[role]), group)
    none: frozenset[Node] = frozenset()
    needed = [(none | {v}, role - {v}, role) for v, role in role_of.items()]
    removed = list(dict.fromkeys([none, *(one for three in needed for one in three)]))  # each once
    without = [knock_out(model, prompts, means, nodes_out) for nodes_out in removed]
    kept = outside(model, prompts, means, set(role_of))
    f = dict(zip(removed, logit_diffs(model, prompts, without, base=kept), strict=True))
    result = {}
    for v, role in role_of.items():
        alone = f[none] - f[none | {v}]
        after_the_rest = f[role - {v}] - f[role]
        result[v] = max(alone, after_the_rest, key=lambda change: change[choose].mean().abs())
    return result
