"""Every claim's rule, on figures just inside and just outside its bounds; words and code agree."""

import ast
import importlib
import math
import re

import pytest

from ioi_claims import PUBLISHED_CIRCUIT, precision_recall
from utils.heads import Head
from utils.ledger.claims import Ledger
from utils.ledger.results import read_json
from utils.metrics import Estimate
from utils.session import ROOT

FILES = {
    "induction_claims": "project-1-induction-heads",
    "census_claims": "project-1-induction-heads",
    "ioi_claims": "project-2-Indirect-Object-Identification",
}
IN_FILE = {name: importlib.import_module(name).CLAIMS for name in FILES}
OF = {
    project: {i: c for name in FILES if FILES[name] == project for i, c in IN_FILE[name].items()}
    for project in FILES.values()
}
CLAIMS = {claim_id: claim for claims in IN_FILE.values() for claim_id, claim in claims.items()}


def E(mean, stderr=0.1):
    return Estimate(mean, stderr, 8)


VERDICTS = {True: "holds", False: "does not hold", None: "undecided"}
NONE, LOW, HIGH = [], [Head(0, 1)], [Head(1, 0), Head(0, 2)]
TWO, THREE = {Head(0, 0), Head(0, 1)}, {Head(0, 0), Head(0, 1), Head(1, 1)}

# id: figures that hold, then (index, figure) with which in its place they just do not
FIGURES = {
    "toy.phase_change": [
        (0.76, 0.76, 0.33, 0.33),
        *((i, 0.75) for i in (0, 1)),
        *((i, rate) for i in (2, 3) for rate in (0.34, math.nan)),  # no stretch to take a rate from
    ],
    "toy.before_after": [(E(0.96),), (0, E(0.7))],
    "toy.path_turns": [
        (0.26, 20, 20, 30, 0.81, 2.1),
        *((0, 0.25), (1, 19), (1, 31), (4, 0.8), (5, 2.0)),
    ],
    "toy.one_layer_control": [(0.19, 0.33), (0, 0.2), (1, 0.34)],
    "toy.smeared_key": [(0.51, 9, 10), (0, 0.5), (1, 10)],
    "toy.previous_token_layer0": [(0.51, LOW), (0, 0.5), (1, HIGH), (1, NONE)],
    "toy.induction_layer1": [(0.51, HIGH, 0.24), (0, 0.5), (1, LOW), (1, NONE), (2, 0.26)],
    "toy.k_composition": [(0.49, 0.91, 0.91), (0, 0.5), (1, 0.9), (2, 0.9)],
    "toy.copying": [(0.51, 0.01), (0, 0.5), (1, 0.0)],
    "lm.repeat_loss": [(E(1.79), E(4.0)), (0, E(2.1))],
    "lm.induction_heads": [(0.4, THREE, 31), (0, 0.39), (1, NONE), (2, 30)],
    "lm.prefix_matching": [(0.41, THREE), (0, 0.4), (1, TWO), (1, NONE)],
    "lm.copying": [(E(0.21), E(0.21), LOW), (0, E(-0.1)), (1, E(-0.1)), (2, NONE)],
    "lm.copying_in_total": [(E(0.21), E(0.21), E(0.21)), *((i, E(-0.1)) for i in range(3))],
    "lm.previous_token_heads": [(0.4, LOW, HIGH), (0, 0.39), (1, HIGH[:1]), (1, NONE), (2, NONE)],
    "lm.duplicate_token_heads": [(0.4,), (0, 0.39)],
    "lm.icl_score": [(E(-0.21),), (0, E(0.1))],
    "lm.ablation": [(E(0.71), E(0.04)), (0, E(0.4)), (1, E(0.3))],
    "lm.icl_ablation": [(E(0.71), E(0.21), E(0.21)), (1, E(-0.2)), (2, E(-0.2))],
    "lm.icl_bigrams": [(E(0.21), E(0.21), E(0.21)), *((i, E(-0.1)) for i in range(3))],
    "lm.pattern_matching": [(E(0.71), E(0.31), LOW), (0, E(0.4)), (1, E(0.09)), (2, NONE)],
    "lm.zero_vs_mean": [(E(0.21),), (0, E(-0.1))],
    "lm.patching_kqv": [(E(0.21, 0.05), E(0.21)), (0, E(0.1, 0)), (0, E(0.05)), (1, E(-0.2))],
    "lm.k_composition": [(0.2, E(0.21), LOW, HIGH), (1, E(-0.1)), (2, NONE), (3, NONE)],
    "census.one_layer": [(0.19, 3), (0, 0.2), (1, 2)],
    "census.smeared": [(0.51, 3), (0, 0.5), (1, 2)],
    "census.depth": [(0.51, 3), (0, 0.5), (1, 2)],
    "census.window": [(E(0.96),), (0, E(0.7))],
    "census.same_score": [(0.09,), (0, 0.1)],
    "census.predicts": [(0.81, 10), (0, 0.8), (1, 9)],
    "census.size_agnostic": [(E(0.0, 0.04),), (0, E(0.2)), (0, E(-0.2))],
    "census.same_tokens": [(E(0.0),), (0, E(0.3)), (0, E(-0.3))],
    "census.quadratic": [(E(2.0),), (0, E(1.4)), (0, E(2.6))],
    "census.pythia": [(1.9, 3), (0, 2.0), (1, 2)],
    "ioi.logit_diff": [(E(1.21),), (0, E(0.9))],
    "ioi.accuracy": [(E(0.9, 0),), (0, E(0.89))],
    "ioi.probability": [(E(0.31),), (0, E(0.09))],
    "ioi.eight_prompts": [(E(1.21),), (0, E(0.9))],
    "ioi.dla_concentrated": [(E(0.71), LOW), (0, E(0.4)), (1, NONE)],
    "ioi.same_heads": [(E(0.71),), (0, E(0.4))],
    "ioi.attention_projection": [(E(0.71), LOW), (0, E(0.4)), (1, NONE)],
    "ioi.name_mover_attention": [(E(0.51), E(0.21), LOW), (0, E(0.2)), (1, E(-0.2)), (2, NONE)],
    "ioi.copy_score": [(E(1.01), E(0.21), LOW), (0, E(0.7)), (1, E(-0.1)), (2, NONE)],
    "ioi.negative_copy_score": [(E(1.01), E(0.21), LOW), (0, E(0.7)), (1, E(-0.1)), (2, NONE)],
    "ioi.s_inhibition_queries": [
        (E(0.31), E(0.21), LOW, HIGH),
        *((0, E(-0.2)), (1, E(-0.2)), (2, NONE), (3, NONE)),
    ],
    "ioi.attention_shift": [
        (E(0.31), E(0.21), E(0.21), LOW, HIGH),
        *((0, E(0.0)), (1, E(-0.2)), (2, E(-0.2)), (3, NONE), (4, NONE)),
    ],
    "ioi.s_inhibition_signal": [(E(0.21),), (0, E(-0.2))],
    "ioi.early_heads": [(E(0.3), LOW, LOW), (0, E(-0.2)), (1, NONE), (2, NONE)],
    "ioi.random_token_roles": [(E(0.71),), (0, E(0.4))],
    "ioi.early_position": [(E(0.71), E(0.04), LOW), (0, E(0.4)), (1, E(0.26)), (2, NONE)],
    "ioi.mlps": [(E(0.71), E(0.04)), (0, E(0.4)), (1, E(0.26))],
    "ioi.backup_kinds": [(E(0.71), LOW, HIGH), (0, E(0.4)), (1, NONE), (2, NONE)],
    "ioi.backup": [(E(0.1), E(0.21), LOW, HIGH), (1, E(-0.2)), (2, NONE), (3, NONE)],
    "ioi.faithfulness": [
        (E(1.0), E(0.8, 0), E(1.2, 0)),
        *((1, E(0.79)), (1, E(1.21)), (2, E(0.79)), (2, E(1.21))),
    ],
    "ioi.distance": [(E(0.09),), (0, E(0.31))],
    "ioi.attributed_circuit": [
        (E(1.0), E(0.8, 0), E(1.2, 0)),
        *((1, E(0.79)), (1, E(1.21)), (2, E(0.79)), (2, E(1.21))),
    ],
    "ioi.greedy_circuit": [
        (E(1.0), E(0.9, 0), E(1.1, 0), E(0.09)),
        *((1, E(0.89)), (1, E(1.11)), (2, E(0.89)), (2, E(1.11)), (3, E(0.31))),
    ],
    "ioi.worst_set": [(E(0.6), E(0.29), E(0.29)), (1, E(0.6)), (2, E(0.6))],
    "ioi.no_repetition": [(E(0.04),), (0, E(0.26))],
    "ioi.naive": [(E(0.8), E(0.79), E(4.0)), (1, E(1.1))],
    "ioi.random_circuit": [(E(0.09),), (0, E(0.4))],
    "ioi.completeness": [(E(0.09), E(-0.21)), (0, E(0.31)), (1, E(0.2))],
    "ioi.minimality": [(E(0.01, 0),), (0, E(0.009))],
    "ioi.adversarial": [(E(1.0), *[E(0.21)] * 4), *((i, E(-0.2)) for i in range(1, 5))],
    "ioi.published_heads": [(0.51, 0.51), (0, 0.5), (1, 0.5)],
}

IN_WORDS = {  # as a rule's text may say a number of its code
    **{"0": "zero|layer 0|some", "1": r"\b1\b|third", "2": "two|twice|half", "3": "three|third"},
    **{"10": "tenth|ten ", "0.1": "tenth|0.1", "0.25": "quarter|0.25", "0.5": "half|0.5"},
}


def numbers(function):
    """The numbers in a function's code, without indices."""
    if isinstance(function, ast.Subscript):
        return numbers(function.value)
    if isinstance(function, ast.Constant):
        return {f"{function.value}"}
    return set().union(*map(numbers, ast.iter_child_nodes(function)))


def replaced(figures, index, figure):
    return (*figures[:index], figure, *figures[index + 1 :])


@pytest.mark.parametrize("claim_id", CLAIMS)
def test_a_rule_holds_inside_its_bounds_and_not_outside(claim_id):
    (inside, *changes), holds = FIGURES[claim_id], CLAIMS[claim_id].holds
    assert changes and holds(*inside)
    assert not [change for change in changes if holds(*replaced(inside, *change))]


@pytest.mark.parametrize("claim_id", CLAIMS)
def test_a_rule_is_undecided_where_an_error_covers_its_bound(claim_id):
    (inside, *changes), holds = FIGURES[claim_id], CLAIMS[claim_id].holds
    estimates = [i for i, figure in enumerate(inside) if isinstance(figure, Estimate)]
    for i in estimates:
        wide = holds(*replaced(inside, i, inside[i]._replace(stderr=10.0)))
        assert wide in (None, True)  # True: the rule takes the mean alone
        for _, outside in [c for c in changes if c[0] == i and wide is None]:
            assert holds(*replaced(inside, i, outside._replace(stderr=10.0))) is None
    changed = {index for index, _ in changes}
    assert (
        not estimates
        or not changed & {*estimates}
        or any(
            holds(*replaced(inside, i, inside[i]._replace(stderr=10.0))) is None for i in estimates
        )
    )


@pytest.mark.parametrize("claim_id", CLAIMS)
def test_without_a_figure_a_claim_does_not_hold(claim_id, tmp_path, monkeypatch):
    monkeypatch.setenv("MECH_INTERP_RESULTS", str(tmp_path))
    ledger = Ledger("project", {claim_id: CLAIMS[claim_id]._replace(needs=())}, "m", "w")

    def verdict(figures):
        ledger.record(claim_id, *figures)
        return read_json(ledger.path)["claims"][0]["verdict"]

    inside = FIGURES[claim_id][0]
    assert verdict(inside) == "holds"
    for i in (i for i, figure in enumerate(inside) if not isinstance(figure, list | set)):
        for missing in (None, math.nan, E(math.nan)):
            assert verdict(replaced(inside, i, missing)) == "does not hold"


@pytest.mark.parametrize("name", FILES)
def test_words_and_code_state_the_same_numbers(name):
    tree = ast.parse((ROOT / FILES[name] / f"{name}.py").read_text())
    (table,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign))  # CLAIMS: ...
    for key, call in zip(table.keys, table.values, strict=True):
        (code,) = (k.value.body for k in call.keywords if k.arg == "holds")
        rule = IN_FILE[name][key.value].rule
        assert re.fullmatch(r"Measured: .*\. Holds when .*\.", rule)
        bound = rule.split("Holds when")[1]
        for number in numbers(code):
            assert re.search(IN_WORDS.get(number, re.escape(number)), bound), (key.value, number)
        said = set(re.findall(r"\b\d\.\d+\b", bound))
        assert {float(x) for x in said} <= {float(x) for x in numbers(code)}, key.value


def test_what_builds_on_the_behaviour_needs_it_and_what_is_needed_comes_first():
    for claims in IN_FILE.values():
        ids = list(claims)
        assert all(set(claims[i].needs) <= set(ids[: ids.index(i)]) for i in ids)

    def chain(claim_id):
        return {claim_id}.union(*map(chain, CLAIMS[claim_id].needs))

    free = {i for i in CLAIMS if i.startswith("ioi.") and "ioi.logit_diff" not in chain(i)}
    assert free == {"ioi.accuracy", "ioi.probability", "ioi.published_heads"}
    path = {i for i in CLAIMS if CLAIMS[i].needs == ("ioi.s_inhibition_queries",)}
    about = (
        "s_inhibition_signal early_heads faithfulness distance naive random_circuit completeness "
        "attention_shift early_position worst_set"
    )
    assert path == {f"ioi.{name}" for name in [*about.split(), "minimality"]}


@pytest.mark.parametrize("project", OF)
def test_committed_verdicts_follow_from_the_committed_figures(project):
    """Where the rule looks at the reported figure alone."""
    for entry in read_json(ROOT / project / "results" / "smollm2-135m.json")["claims"]:
        claim = OF[project][entry["id"]]
        fields = ("statement", "source", "published", "published_model")
        assert [entry[field] for field in fields] == [getattr(claim, field) for field in fields]
        decided = entry["for_want_of"] or entry["measured"] is None
        if claim.holds.__code__.co_argcount == 1 and not decided:
            given = Estimate(entry["measured"], entry["stderr"], entry["n"])
            measured = given if entry["n"] else entry["measured"]
            assert entry["verdict"] == VERDICTS[claim.holds(measured)]


def test_statements_name_no_head_and_every_claim_a_source():
    assert set(FIGURES) == set(CLAIMS)
    for claim_id, claim in CLAIMS.items():
        assert claim.quantity, claim_id
        assert claim.source and re.fullmatch(r"(toy|lm|ioi|census)\.[a-z0-9_]+", claim_id)
        assert not re.search(r"\b(L\d+H\d+|\d{1,2}\.\d{1,2}\b(?= heads?))", claim.statement)


def test_the_published_circuit():
    heads = [head for heads in PUBLISHED_CIRCUIT.values() for head in heads]
    assert len(set(heads)) == 26 and {(9, 9), (4, 11), (10, 7)} <= set(heads)
    assert precision_recall(heads) == (1, 1)
    assert precision_recall([(9, 9), (0, 0)]) == (0.5, 1 / 26)
    assert precision_recall([]) == (0, 0)
