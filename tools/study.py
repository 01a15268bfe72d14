"""What takes too long for the IOI notebook: circuits by search, and what feeds the early heads.

    python -m tools.study [PART ...]      PART: search, judge, worst, back; none means all

Rewrites these parts of results/study/<model>.json, which the notebook reads. Nodes are chosen on
one set of prompts, means come from a second, and circuits are judged on a third. The circuit by
roles is that of the committed ledger, which the notebook made.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge

from utils import circuit, ioi, paths, selection
from utils.circuit import Circuit, Node
from utils.edits import Run
from utils.heads import Head
from utils.ledger.results import plain, read_json, write_json
from utils.metrics import Estimate, LogitDiff, estimate
from utils.models import load_model, model_label, weights_digest
from utils.session import ROOT

PROJECT = ROOT / "project-2-Indirect-Object-Identification"
SETS = {
    "chosen_on": {"n_prompts": 64, "seed": 4},
    "means": {"n_prompts": 128, "seed": 3},
    "judged_on": {"n_prompts": 384, "seed": 0},
    "paths_on": {"n_prompts": 32, "seed": 2},
}
N_CANDIDATES, N_NODES, N_WORST = 40, 30, 8
SIZES = (5, 10, 15, 20, 25, 30)
# What a role reads, and where: site and place. (The senders of induction keys are in the notebook.)
READS = {
    "s_inhibition": (("v", "S2"),),
    "giver_suppressor": (("k", "S2"),),
    "induction": (("q", "S2"), ("v", "S1+1")),
    "duplicate_token": (("q", "S2"), ("k", "S1"), ("v", "S1")),
    "previous_token": (("q", "S1+1"), ("k", "S1"), ("v", "S1")),
}
EVERYWHERE = "all positions"
Figures = list[float | None]  # mean and standard error


def search(model: TransformerBridge, found: Circuit, results: dict) -> dict:
    """Lists of nodes, each in an order of its own, the first of each to be taken together."""
    prompts, others = sets(model, "chosen_on", "means")
    means = circuit.means_run(prompts, circuit.abc_means(model, others))
    candidates = rank(model, prompts, means)[:N_CANDIDATES]
    say("ranked by attribution")
    forward = selection.forward_search(model, prompts, means, candidates, N_NODES)
    say("forward")
    backward = selection.backward_search(model, prompts, means, candidates, n_left=1)
    (last,) = set(candidates) - {step.node for step in backward}
    orders = {
        "attribution": candidates,
        "forward": [step.node for step in forward],
        "backward": [last, *(step.node for step in reversed(backward))],
    }
    # by the number of nodes, as the search saw it
    far = {"forward": forward, "backward": reversed(backward)}
    return {
        "orders": {name: list(map(str, order)) for name, order in orders.items()},
        "distance_when_chosen": {
            name: [plain(step.figure) for step in steps] for name, steps in far.items()
        },
    }


def judge(model: TransformerBridge, found: Circuit, results: dict) -> dict:
    """How faithful the first nodes of each list are, and of the circuit by roles."""
    prompts, others = sets(model, "judged_on", "means")
    means = circuit.means_run(prompts, circuit.abc_means(model, others))
    by_roles = in_turn(found)
    sizes = [*(size for size in SIZES if size < len(by_roles)), len(by_roles)]
    curves = {"roles": curve(model, prompts, means, by_roles, sizes)}
    for name, labels in results["orders"].items():
        order = list(map(Node.from_label, labels))
        curves[name] = curve(model, prompts, means, order, SIZES)
        say(name)
    return {"curves": curves, "roles": list(map(str, by_roles))}


def worst(model: TransformerBridge, found: Circuit, results: dict) -> dict:
    """The nodes without which circuit and model differ most, one after another."""
    prompts, others = sets(model, "chosen_on", "means")
    means = circuit.means_run(prompts, circuit.abc_means(model, others))
    steps = selection.worst_set(model, prompts, means, circuit.nodes(found), N_WORST)
    return {"worst_set": [[str(step.node), plain(step.figure)] for step in steps]}


def back(model: TransformerBridge, found: Circuit, results: dict) -> dict:
    """Whose paths count for what each role reads, and for what those read, until none is new.

    Senders without a role are followed together: their queries where they were found to act, their
    keys and values at every position, since no rule says where they look.
    """
    (prompts,) = sets(model, "paths_on")
    passing: dict[str, dict[str, dict[str, Figures]]] = {}
    to_do = [(role, found[role], *read) for role in READS if role in found for read in READS[role]]
    followed = {head for heads in found.values() for head in heads}
    while to_do:
        name, receivers, site, place = to_do.pop(0)
        effects = to_receivers(model, prompts, receivers, site, place)
        senders = passing[f"{name}: {site} at {place}"] = chosen(effects, prompts)
        say(f"{name}, {site} at {place}: {', '.join(senders) or 'none'}")
        new = [head for head in map(Head.from_label, senders) if head not in followed]
        followed |= set(new)
        reads = (("q", place), ("k", EVERYWHERE), ("v", EVERYWHERE))
        to_do += [(" ".join(map(str, new)), new, *read) for read in reads if new]
    return {"back": passing}


def to_receivers(
    model: TransformerBridge, prompts: ioi.IOIPrompts, receivers: list[Head], site: str, place: str
) -> Float[Tensor, "prompt layer head"]:
    """Share of the logit difference lost with each head's path to these taken from ABC."""
    before = circuit.logit_diffs(model, prompts, [[]])[0]
    at = None if place == EVERYWHERE else prompts.positions[place]
    to = {"receivers": receivers, "site": site, "positions": at}
    metric, new = LogitDiff(prompts.answers), prompts.corrupted["abc"]
    after = paths.path_patch(model, prompts.tokens, new, metric, **to)
    return (before[:, None, None] - after) / before.mean().abs()


def sets(model: TransformerBridge, *names: str) -> list[ioi.IOIPrompts]:
    return [ioi.ioi_prompts(model, **SETS[name]) for name in names]


def chosen(
    effects: Float[Tensor, "prompt layer head"], prompts: ioi.IOIPrompts
) -> dict[str, dict[str, Figures]]:
    """Share lost by the heads that pass the notebook's rule in either order of the names."""
    heads = [
        head
        for sign in (1, -1)
        for head in circuit.select_heads(effects, 0.01, sign, prompts.is_abba)
    ]
    return {
        str(head): {
            name: figures(estimate(effects[which, head.layer, head.head]))
            for name, which in orders(prompts).items()
        }
        for head in heads
    }


def orders(prompts: ioi.IOIPrompts) -> dict[str, Bool[Tensor, "prompt"]]:
    """Which prompts are meant by the name of a figure."""
    return {"all": prompts.is_abba | True, "ABBA": prompts.is_abba, "BABA": ~prompts.is_abba}


def rank(model: TransformerBridge, prompts: ioi.IOIPrompts, means: Run) -> list[Node]:
    """Nodes by size of attribution, in the order of the names in which it is larger."""
    by_node = selection.named_nodes(selection.node_attribution(model, prompts, means), prompts)
    either = prompts.is_abba.cpu(), ~prompts.is_abba.cpu()
    size = {n: max(v[which].mean().abs() for which in either) for n, v in by_node.items()}
    return sorted(size, key=lambda node: -size[node])


def in_turn(found: Circuit) -> list[Node]:
    """The nodes of a circuit: the first head of every role, then the second of each, and so on."""
    ranks = range(max(map(len, found.values())))
    turns = [(role, heads[i]) for i in ranks for role, heads in found.items() if i < len(heads)]
    return list(dict.fromkeys(Node(head, circuit.ROLE_POSITIONS[role]) for role, head in turns))


def curve(
    model: TransformerBridge,
    prompts: ioi.IOIPrompts,
    means: Run,
    order: Sequence[Node],
    sizes: Sequence[int],
) -> list[dict[str, int | Figures]]:
    """How faithful the first nodes of a list are, for these numbers of them."""
    f_model = circuit.logit_diffs(model, prompts, [[]])[0]
    rows = []
    for size in sizes:
        f = circuit.run_circuit(model, prompts, means, set(order[:size]))
        row: dict[str, int | Figures] = {"nodes": size}
        for name, which in orders(prompts).items():
            row[name] = figures(circuit.faithfulness(f[which], f_model[which]).ratio)
        far = (f - f_model).abs() / f_model.mean().abs()
        rows.append(row | {"distance": figures(estimate(far))})
    return rows


def figures(values: Estimate) -> Figures:
    return [plain(values.mean), plain(values.stderr)]


def say(what: str) -> None:
    print(f"{time.strftime('%H:%M:%S')}  {what}", flush=True)


PARTS = {"search": search, "judge": judge, "worst": worst, "back": back}


def main(names: list[str]) -> None:
    """Run these parts for the default model. FileNotFoundError where it has no ledger yet."""
    torch.set_grad_enabled(False)
    model = load_model()
    label = model_label(model)
    ledger = read_json(PROJECT / "results" / f"{label}.json")
    found = {role: list(map(Head.from_label, labels)) for role, labels in ledger["heads"].items()}
    path = PROJECT / "results" / "study" / f"{label}.json"
    versions = {name: version(name) for name in ("torch", "transformer_lens")}
    made_by = {"model": label, "weights": weights_digest(model), "versions": versions, "sets": SETS}
    results = read_json(path) if path.exists() else {}
    for name in names or PARTS:
        results |= PARTS[name](model, found, results)
        write_json(path, results | made_by)
        say(f"{name}: written")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m tools.study", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*PARTS, []], metavar="PART")
    try:
        main(parser.parse_args().names)
    except FileNotFoundError as error:
        print(f"{error}: run `make outputs` first", file=sys.stderr)
        sys.exit(1)
