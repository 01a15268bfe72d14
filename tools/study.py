"""Circuits found by search: what takes too long for the IOI notebook, which reads the results.

    python -m tools.study            make study: search, judge, write results/study/<model>.json

Nodes are chosen on one set of prompts, means come from a second, and every circuit is judged on a
third. The circuit by roles is that of the committed ledger, made by the notebook itself.
"""

import sys
import time
from collections.abc import Sequence
from importlib.metadata import version

import torch

from utils import circuit, ioi, selection
from utils.circuit import Circuit, Node
from utils.edits import Run
from utils.heads import Head
from utils.metrics import Estimate, estimate
from utils.models import load_model, model_label, weights_digest
from utils.results import ROOT, plain, read_json, write_json

PROJECT = ROOT / "project-2-Indirect-Object-Identification"
CHOOSE, MEANS, JUDGE = (
    {"n_prompts": 64, "seed": 4},
    {"n_prompts": 128, "seed": 3},
    {"n_prompts": 64, "seed": 0},
)
N_CANDIDATES, N_NODES, N_WORST = 40, 30, 8
SIZES = (5, 10, 15, 20, 25, 30, 40)


def study() -> None:
    """Search, judge and write. Raises FileNotFoundError where the model has no ledger yet."""
    torch.set_grad_enabled(False)
    model, began = load_model(), time.monotonic()
    label = model_label(model)
    ledger = read_json(PROJECT / "results" / f"{label}.json")
    found = {role: [named_head(h) for h in heads] for role, heads in ledger["heads"].items()}

    prompts, others, judge = (ioi.ioi_prompts(model, **each) for each in (CHOOSE, MEANS, JUDGE))
    by_template = circuit.abc_means(model, others)
    means = circuit.means_run(prompts, by_template)
    say("attribution", began)
    by_size = rank(model, prompts, means)
    candidates = by_size[:N_CANDIDATES]
    say("forward search", began)
    forward = selection.forward_search(model, prompts, means, candidates, N_NODES)
    say("backward search", began)
    backward = selection.backward_search(model, prompts, means, candidates, n_left=1)
    (last,) = set(candidates) - {step.node for step in backward}
    orders = {
        "roles": in_turn(found),
        "attribution": candidates,
        "forward": [step.node for step in forward],
        "backward": [last, *(step.node for step in reversed(backward))],
    }
    say("worst set", began)
    worst = selection.worst_set(model, prompts, means, circuit.nodes(found), N_WORST)
    say("judging", began)
    judged_by = circuit.means_run(judge, by_template)
    curves = {name: curve(model, judge, judged_by, order) for name, order in orders.items()}
    packages = {name: version(name) for name in ("torch", "transformer_lens")}
    head = {"model": label, "weights": weights_digest(model), "versions": packages}
    sets = {"chosen_on": CHOOSE, "means": MEANS, "judged_on": JUDGE}
    results = {
        "orders": {name: list(map(str_node, order)) for name, order in orders.items()},
        "worst_set": [[str_node(step.node), plain(step.figure)] for step in worst],
        "curves": curves,
        "seconds": round(time.monotonic() - began),
    }
    write_json(PROJECT / "results" / "study" / f"{label}.json", head | sets | results)


def rank(model, prompts: ioi.IOIPrompts, means: Run) -> list[Node]:
    """Nodes by size of attribution, in the order of the names in which it is larger."""
    attributed = selection.node_attribution(model, prompts, means)
    by_node = selection.named_nodes(attributed, prompts)
    orders = prompts.is_abba.cpu(), ~prompts.is_abba.cpu()
    size = {n: max(v[which].mean().abs() for which in orders) for n, v in by_node.items()}
    return sorted(size, key=lambda node: -size[node])


def in_turn(found: Circuit) -> list[Node]:
    """The nodes of a circuit: the first head of every role, then the second of each, and so on."""
    ranks = range(max(map(len, found.values())))
    turns = [(role, heads[i]) for i in ranks for role, heads in found.items() if i < len(heads)]
    return list(dict.fromkeys((head, circuit.ROLE_POSITIONS[role]) for role, head in turns))


def curve(
    model, judge: ioi.IOIPrompts, means: Run, order: Sequence[Node]
) -> list[dict[str, int | list]]:
    """How faithful the first nodes of a list are, for some numbers of them and for all."""
    f_model = circuit.logit_diffs(model, judge, [[]])[0]
    groups = {"all": judge.is_abba | True, "ABBA": judge.is_abba, "BABA": ~judge.is_abba}
    rows = []
    for size in [s for s in SIZES if s < len(order)] + [len(order)] * (len(order) <= SIZES[-1]):
        f = circuit.run_circuit(model, judge, means, set(order[:size]))
        row: dict[str, int | list] = {"nodes": size}
        for name, which in groups.items():
            row[name] = figures(circuit.faithfulness(f[which], f_model[which]).ratio)
        far = (f - f_model).abs() / f_model.mean().abs()
        rows.append(row | {"distance": figures(estimate(far))})
    return rows


def figures(values: Estimate) -> list[float | None]:
    return [plain(values.mean), plain(values.stderr)]


def str_node(node: Node) -> str:
    return f"{node[0]} {node[1]}"


def named_head(label: str) -> Head:
    return Head(*map(int, label[1:].split("H")))


def say(what: str, began: float) -> None:
    print(f"{time.monotonic() - began:5.0f} s  {what}", flush=True)


if __name__ == "__main__":
    try:
        study()
    except FileNotFoundError as error:
        print(f"{error}: run `make outputs` first", file=sys.stderr)
        sys.exit(1)
