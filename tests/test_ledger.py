"""The ledger: its file, what it refuses, its tables, and what counts as a difference."""

import json
import math
import re
from unittest.mock import Mock
from xml.etree import ElementTree

import numpy as np
import pytest

from tools.results import compare, markdown_table, summary
from utils.heads import Head
from utils.ledger import claims as ledger_module
from utils.ledger.claims import Claim, Ledger
from utils.ledger.results import decimals, merge_seeds, others, read_json, why, write_json
from utils.ledger.rules import above, at_least, below, every
from utils.ledger.table import LedgerTable, Rule
from utils.metrics import Estimate
from utils.models.offline import GGUF_IS


def loss(figure):
    return below(figure._replace(n=1), 4)


CLAIMS = {
    "toy.copying": Claim("It copies", "p", "r.", lambda mean: mean > 0.4),
    "lm.loss": Claim("Loss", "s. 2", "r.", lambda x, heads=(): loss(x), 0.18, "gpt2-small"),
    "lm.needy": Claim("More", "p", "r.", lambda x: x > 0, needs=("lm.loss",)),
}


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    monkeypatch.setenv("MECH_INTERP_RESULTS", str(tmp_path))
    return Ledger("project", CLAIMS, "smollm2-135m", "abc")


def verdicts(ledger):
    return {claim["id"]: claim["verdict"] for claim in read_json(ledger.path)["claims"]}


def entry(claim_id, measured, holds=True, stderr=None, n=None, **more):
    claim = {"id": claim_id, "statement": "s", "source": "p", "published": None}
    figure = {"published_model": None, "measured": measured, "stderr": stderr, "n": n}
    verdict = {"others": {}, "verdict": "holds" if holds else "does not hold"}
    return claim | figure | verdict | more


def run(*claims, weights="abc", **heads):
    model = {"model": "smollm2-135m", "weights": weights, "versions": {"torch": "2"}}
    return model | {"claims": list(claims), "heads": heads}


def test_the_file_follows_the_schema(ledger, tmp_path):
    ledger.record("lm.loss", Estimate(3.14159265, 0.0123456, 64), heads=[Head(5, 5)])
    ledger.record("toy.copying", 0.25)
    ledger.record_heads("induction", [Head(5, 5), "L6H9"])
    data = read_json(tmp_path / "project" / "smollm2-135m.json")
    assert list(data) == ["model", "weights", "versions", "claims", "heads"]
    assert (data["model"], data["weights"]) == ("smollm2-135m", "abc")
    assert set(data["versions"]) == {"torch", "transformer_lens"}
    assert data["heads"] == {"induction": ["L5H5", "L6H9"]}
    toy, lm = data["claims"]  # in the order of the claims file, not of recording
    figures = [toy[key] for key in ("measured", "stderr", "n", "verdict")]
    assert figures == [0.25, None, None, "does not hold"]
    text = {"id": "lm.loss", "statement": "Loss", "source": "s. 2"}
    text |= {"quantity": None, "published": 0.18}
    figure = {"published_model": "gpt2-small", "measured": 3.142, "stderr": 0.01235, "n": 64}
    figure["n_of"] = None
    verdict = {"others": {}, "for_want_of": [], "holds_when": "", "verdict": "holds"}
    assert list(lm.items()) == list((text | figure | verdict).items())


def test_what_else_a_rule_looks_at_is_kept_by_its_name(ledger):
    ledger.claims = {"a": Claim("A", "p", "r.", lambda x, rate, of, heads, ok: False)}
    ledger.record("a", 1.0, Estimate(0.25, 0.1, 3), math.inf, [Head(0, 1)], True)
    (claim,) = read_json(ledger.path)["claims"]
    assert claim["others"] == {"rate": 0.25, "of": None}
    assert others(claim | {"others": {"rate_before": 0.25, "of": None}}) == "rate before 0.250"


def test_what_a_claim_lacks_is_told(ledger):
    fails = Claim("Heads form", "p", "r.", lambda x: False)
    ledger.claims = {"a": fails, "b": Claim("All alike", "p", "r.", lambda x: x < 1, needs=("a",))}
    ledger.record("a", 1.0)
    ledger.record("b", 0.5)
    first, second = read_json(ledger.path)["claims"]
    assert (why(first), why(second)) == ("", "but needs “Heads form”")
    assert "but needs “Heads form”" in ledger.table()._repr_html_()
    assert "ours 0.500 but needs" in repr(ledger.table())
    assert "2 do not (1 of them since a claim that they need does not)." in repr(ledger.table())


def test_a_new_ledger_drops_the_old_run_and_a_second_figure_the_first(ledger):
    ledger.record("toy.copying", 0.5)
    ledger.record("toy.copying", 0.25)
    (claim,) = read_json(ledger.path)["claims"]
    assert (claim["measured"], claim["verdict"]) == (0.25, "does not hold")
    again = Ledger("project", CLAIMS, "smollm2-135m", "abc")
    assert read_json(again.path)["claims"] == []


def test_default_folder_is_build_results(monkeypatch, tmp_path):
    monkeypatch.delenv("MECH_INTERP_RESULTS", raising=False)
    monkeypatch.setattr(ledger_module, "ROOT", tmp_path)
    path = tmp_path / "build" / "results" / "project" / "m.json"
    assert Ledger("project", CLAIMS, "m", "w").path == path


@pytest.mark.parametrize("value", [None, math.nan, math.inf, Estimate(math.nan, math.nan, 1)])
def test_without_a_finite_figure_nothing_holds(ledger, value):
    ledger.record("toy.copying", value)
    (claim,) = json.loads(ledger.path.read_text(), parse_constant=pytest.fail)["claims"]
    assert (claim["measured"], claim["stderr"], claim["verdict"]) == (None, None, "does not hold")


@pytest.mark.parametrize("verdict", ["no", math.nan, 1, [True]])
def test_a_rule_that_gives_no_verdict_is_refused(ledger, verdict):
    ledger.claims = {"odd": Claim("Odd", "p", "r.", lambda x: verdict)}
    with pytest.raises(TypeError, match="odd: its rule must give True, False or None, got"):
        ledger.record("odd", 0.5)
    assert verdicts(ledger) == {}


@pytest.mark.parametrize(
    ("figure", "message"),
    [
        (Estimate(1.0, -0.1, 8), "a standard error must be 0 or more, got -0.1"),
        (Estimate(1.0, math.inf, 8), "a standard error must be 0 or more, got inf"),
        (Estimate(1.0, None, 8), "a standard error must be 0 or more, got None"),
        (Estimate(1.0, 0.1, -8), "n must be a count, got -8"),
        (Estimate(1.0, 0.1, 0.5), "n must be a count, got 0.5"),
        ((1.0, 0.1), "an estimate is .mean, stderr, n., got"),
        ("0.5", "measured must be a number or an Estimate, got '0.5'"),
        ([0.5], "measured must be a number or an Estimate"),
    ],
)
def test_a_figure_that_is_none_is_refused(ledger, figure, message):
    with pytest.raises((TypeError, ValueError), match=f"toy.copying: {message}"):
        ledger.record("toy.copying", figure)
    assert verdicts(ledger) == {}


def test_a_claim_holds_only_with_those_it_needs(ledger):
    with pytest.raises(ValueError, match=r"lm\.needy needs lm\.loss, which was not recorded"):
        ledger.record("lm.needy", 1.0)
    ledger.record("lm.loss", Estimate(5.0, 0.1, 8))
    ledger.record("lm.needy", 1.0)
    assert verdicts(ledger) == {"lm.loss": "does not hold", "lm.needy": "does not hold"}
    ledger.record("lm.loss", Estimate(3.0, 0.1, 8))
    assert verdicts(ledger) == {"lm.loss": "holds"}  # the other was decided by the old verdict
    for figure, verdict in ((1.0, "holds"), (-1.0, "does not hold")):
        ledger.record("lm.needy", figure)
        assert verdicts(ledger) == {"lm.loss": "holds", "lm.needy": verdict}


def test_within_two_standard_errors_a_claim_is_undecided_and_so_is_what_needs_it(ledger):
    for mean, verdict in (
        (3.7, "holds"),
        (3.9, "undecided"),
        (4.1, "undecided"),
        (4.3, "does not hold"),
    ):
        ledger.record("lm.loss", Estimate(mean, 0.1, 8))
        for figure, needy in ((1.0, verdict), (-1.0, "does not hold")):
            ledger.record("lm.needy", figure)
            assert verdicts(ledger) == {"lm.loss": verdict, "lm.needy": needy}


@pytest.mark.parametrize(
    ("verdict", "is_"),
    [
        (above(0.6, 0.5), True),
        (above(0.5, 0.5), False),
        (at_least(0.5, 0.5), True),
        (below(0.5, 0.5), False),
        (above(Estimate(0.6, 0.04, 9), 0.5), True),
        (above(Estimate(0.6, 0.05, 9), 0.5), None),
        (above(Estimate(0.45, 0.05, 9), 0.5), None),
        (above(Estimate(0.3, 0.05, 9), 0.5), False),
        (below(Estimate(0.3, 0.05, 9), 0.5), True),
        (above(Estimate(0.6, math.nan, 1), 0.5), None),
        (above(Estimate(1.0, 0.3, 9), Estimate(0.0, 0.4, 9)), None),  # together 0.5
        (above(Estimate(1.0, 0.24, 9), Estimate(0.0, 0.4, 9)), True),
        (every(True, None, True), None),
        (every(True, None, False), False),
        (every(True, np.bool_(False)), False),
        (every(), True),
    ],
)
def test_comparisons_know_when_they_cannot_tell(verdict, is_):
    assert verdict is is_


@pytest.mark.parametrize("verdict", ["no", math.nan, 1, [], Estimate(1.0, 0.1, 3)])
def test_what_is_no_verdict_is_not_taken_for_one(verdict):
    with pytest.raises(TypeError, match=r"verdicts must be True, False or None, got "):
        every(True, verdict)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    write_json(path := tmp_path / "a.json", {"old": 1})
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_json(path, {"new": 1})
    assert read_json(path) == {"old": 1} and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("refused", "message"),
    [
        (lambda ledger: ledger.record("lm.no", 1.0), "claim_id: got 'lm.no', want one of toy"),
        (lambda ledger: ledger.record("lm.loss", 1.0), "lm.loss: its rule cannot use these"),
        (lambda ledger: ledger.record("toy.copying", 1.0, 2), "toy.copying: its rule cannot use"),
        (lambda ledger: ledger.record_heads("My heads", []), "role: got 'My heads'"),
        (lambda ledger: ledger.record_heads("induction", ["5.5"]), "heads: got ['5.5']"),
        (lambda ledger: Ledger("project", CLAIMS, "../x", "w"), "model_label: got '../x'"),
        (lambda ledger: Ledger("", CLAIMS, "m", "w"), "project: got ''"),
    ],
)
def test_refusals(ledger, refused, message):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        refused(ledger)


def test_table_shows_verdicts_first_then_figures_and_the_rule_folded(ledger, tmp_path):
    ledger.record("toy.copying", 0.5)
    ledger.record("lm.loss", Estimate(3.14159, 0.0123, 64))
    ledger.record("lm.needy", math.nan)
    table = ledger.table()
    assert repr(table).splitlines() == [
        "2 of 3 claims hold, 1 does not.",
        "✓ holds: It copies: ours 0.500; published –",
        "✓ holds: Loss: ours 3.142 ± 0.012 (n = 64); published 0.18 (gpt2-small)",
        "✗ does not hold: More: ours –; published –",
    ]
    html = table._repr_html_()
    ElementTree.fromstring(html)  # whole, and every sign escaped
    text = re.sub(r"\s*<[^>]*>\s*", "|", html)
    assert re.search(r"2 of 3 claims hold, 1 does not\.\|.*✓ holds\|+It copies\|", text, re.DOTALL)
    assert "rule and source|r. Needs: “Loss”.|p|" in text
    assert not any(claim_id in html for claim_id in CLAIMS)

    seeds = tmp_path / "toy_seeds.json"
    assert repr(ledger.table(seeds)) == repr(table)  # no such file yet
    write_json(seeds, {"1": run(entry("toy.copying", 0.7, holds=False))})
    row = "? undecided (holds in 1 of 2 seeds): It copies: ours 0.600 ± 0.100 (n = 2 seeds)"
    assert repr(ledger.table(seeds)).splitlines()[1] == f"{row}; published –"
    assert repr(ledger.table(seeds, own_seed=1)) == repr(table)  # this run's own: counted once
    html = ledger.table(seeds)._repr_html_()
    assert ">? undecided</span>" in html and "<div>holds in 1 of 2 seeds</div>" in html


def test_the_table_begins_with_links_to_what_does_not_hold_or_is_undecided():
    claims = [entry("a", 1.0), entry("b", 0.0, holds=False, statement="B < C", published=-0.4)]
    html = LedgerTable(claims, [Rule("p", "r")] * 2, "first")._repr_html_()
    links = '<p>Do not hold:</p><ul><li><a href="#first-2">B &lt; C</a></li></ul>'
    assert links in html and '<div id="first-2"' in html and "Undecided" not in html
    assert "published: −0.4<" in html


@pytest.mark.parametrize(
    ("value", "text"), [(-0.00012, "0.000"), (-1.5, "−1.500"), (0.0006, "0.001"), (12, "12.000")]
)
def test_figures_have_one_precision_and_no_negative_zero(value, text):
    assert decimals(value) == text


@pytest.mark.parametrize(
    ("fresh", "committed", "differs"),
    [
        (entry("lm.a", 0.5), entry("lm.a", 0.5), False),
        (entry("lm.a", 0.519), entry("lm.a", 0.5), False),  # within 0.02
        (entry("lm.a", 0.53), entry("lm.a", 0.5), True),
        (entry("lm.a", 10.4), entry("lm.a", 10.0), False),  # within 5 %
        (entry("lm.a", 10.6), entry("lm.a", 10.0), True),
        (entry("lm.a", 0.9, n=9), entry("lm.a", 0.5, stderr=0.11, n=9), False),  # within 4 stderr
        (entry("lm.a", 0.95, n=9), entry("lm.a", 0.5, stderr=0.11, n=9), True),
        (entry("lm.a", 0.5, n=8), entry("lm.a", 0.5, n=9), True),
        (entry("lm.a", 0.5, others={"b": 0.44}), entry("lm.a", 0.5, others={"b": 0.4}), False),
        (entry("lm.a", 0.5, others={"b": 0.46}), entry("lm.a", 0.5, others={"b": 0.4}), True),
        (entry("lm.a", 0.5), entry("lm.a", 0.5, others={"b": 0.4}), True),
        # over seeds: sd = 0.05 * 2 = 0.1, so 0.4 is allowed and stderr alone would not do
        (entry("toy.a", 0.85), entry("toy.a", 0.5, stderr=0.05, n=4, holds_in="4/4"), False),
        (entry("toy.a", 0.95), entry("toy.a", 0.5, stderr=0.05, n=4, holds_in="4/4"), True),
        (entry("lm.a", 0.5, holds=False), entry("lm.a", 0.5), True),
        (entry("toy.a", 0.5), entry("toy.a", 0.5, holds=False, n=5, holds_in="4/5"), False),
        (entry("toy.a", 0.5), entry("toy.a", 0.5, holds=False, n=5, holds_in="0/5"), True),
        (entry("toy.a", 0.5, holds=False), entry("toy.a", 0.5, n=5, holds_in="5/5"), True),
        (entry("lm.a", None, holds=False), entry("lm.a", None, holds=False), False),
        (entry("lm.a", None, holds=False), entry("lm.a", 0.5, holds=False), True),
        (entry("lm.a", 0.5, holds=False), entry("lm.a", None, holds=False), True),
        (entry("lm.b", 0.5), entry("lm.a", 0.5), True),
    ],
)
def test_compare_claims(fresh, committed, differs):
    assert bool(compare(run(fresh), run(committed))) is differs


@pytest.mark.parametrize(
    ("fresh", "committed", "differs"),
    [
        (["L5H5"], ["L5H5"], False),
        (["L5H5"], ["L5H5", "L6H9"], False),  # one head may differ
        (["L5H5", "L7H1"], ["L5H5", "L6H9"], True),
        ([f"L0H{i}" for i in range(8)], [f"L0H{i}" for i in range(10)], False),  # a fifth
        ([f"L0H{i}" for i in range(7)], [f"L0H{i}" for i in range(10)], True),
    ],
)
def test_compare_heads(fresh, committed, differs):
    assert bool(compare(run(induction=fresh), run(induction=committed))) is differs


def test_compare_roles_and_weights():
    assert "heads, induction" in compare(run(induction=[]), run())[0]
    assert "weights: abc, committed xyz" in compare(run(), run(weights="xyz"))[0]


def test_merge_seeds_averages_toy_claims_only():
    full = run(entry("toy.a", 0.5, others={"b": 1.0}), entry("lm.a", 0.1, stderr=0.01, n=8))
    others_of = ({"b": 2.0}, {"b": 6.0})
    seeds = [run(entry("toy.a", 0.7, others=others_of[0]))]
    seeds += [run(entry("toy.a", 0.9, holds=False, others=others_of[1]))]
    toy, lm = merge_seeds(full, seeds)["claims"]
    assert toy["measured"] == pytest.approx(0.7)
    assert toy["stderr"] == pytest.approx(0.2 / math.sqrt(3), rel=1e-3)
    assert (toy["n"], toy["verdict"], toy["holds_in"]) == (3, "undecided", "2/3")
    assert toy["others"] == {"b": 3.0}
    assert lm == full["claims"][1]
    assert full["claims"][0]["measured"] == 0.5  # the input is as it was


def test_merge_seeds_with_missing_figures():
    runs = [run(entry("toy.a", None, holds=False)), run(entry("toy.a", 0.7))]
    claim = merge_seeds(runs[0], runs[1:])["claims"][0]
    fields = ("measured", "stderr", "n", "holds_in")
    assert [claim[field] for field in fields] == [0.7, None, 1, "1/2"]
    claim = merge_seeds(runs[0], runs[:1])["claims"][0]
    assert (claim["measured"], claim["holds_in"]) == (None, "0/2")
    with pytest.raises(ValueError, match=r"toy\.a is missing"):
        merge_seeds(runs[0], [run()])


def test_markdown(tmp_path):
    published = {"statement": "a | b", "published": 3.56, "published_model": "gpt2-small"}
    published["quantity"] = "score, -1 to 1"
    data = run(
        entry("lm.a", 0.5, stderr=0.01, n=8, **published),
        entry("toy.a", 0.25, holds=False, stderr=0.0, n=5, n_of="seeds", holds_in="0/5"),
        previous_token=["L3H4"],
        duplicate_token=[],
    )
    write_json(tmp_path / "m.json", data)
    text = markdown_table(tmp_path / "m.json")
    assert text == markdown_table(data)
    assert text == (
        f"Model: `smollm2-135m` ({GGUF_IS}); torch 2.\n\n"
        "1 of 2 claims hold, 1 does not.\n\n"
        "| verdict | claim | what is measured | published | ours ± standard error (n) |\n"
        "| --- | --- | --- | --- | --- |\n"
        "| ✓ holds | a \\| b | score, −1 to 1 | 3.56 (gpt2-small) | 0.500 ± 0.010 (n = 8) |\n"
        "| ✗ does not hold (holds in 0 of 5 seeds) | s | – | – | 0.250 ± 0.000 (n = 5 seeds) |\n\n"
        "| role | heads |\n| --- | --- |\n"
        "| previous token | L3H4 |\n| duplicate token | none |\n"
    )
    theirs = markdown_table(data, run(entry("lm.a", 0.4, holds=False))).split("\n")
    assert theirs[4].endswith("| ours ± standard error (n) | ours on gpt2-small |")
    assert theirs[6].endswith("| 0.500 ± 0.010 (n = 8) | ✗ does not hold 0.400 |")
    assert theirs[7].endswith("| 0.250 ± 0.000 (n = 5 seeds) | – |")


def test_summary_names_failures_and_shows_the_papers_model_beside_ours():
    claims = [
        entry("lm.a", -0.00004, statement="It is small"),
        entry("lm.b", 0.1, holds=False, statement="It is large", others={"bound": 0.2}),
    ]
    text = summary(run(*claims), ["lm.a"])
    assert text == (
        f"**1 of 2 claims hold, 1 does not** for `smollm2-135m` ({GGUF_IS}). Some of them:\n\n"
        "- ✓ It is small.<br>Ours: 0.000.\n\n"
        "<details><summary>Claims that do not hold</summary>\n\n"
        "- It is large.<br>Ours: 0.100, with bound 0.200.\n\n</details>\n"
    )
    claims[1] |= {"others": {}, "holds_when": "it lies between -0.2 and 0.2"}
    assert "Ours: 0.100; holds when it lies between −0.2 and 0.2.\n" in summary(run(*claims), [])
    named = summary(run(*claims), ["lm.b"])
    assert "- ✗ It is large.<br>Ours: 0.100; holds when it lies between −0.2 and 0.2.\n" in named
    claims[0] |= {"published": 3.56, "published_model": None}
    labelled = summary(run(claims[0] | {"quantity": "mean loss"}), ["lm.a"])
    assert "It is small.<br>Mean loss: ours 0.000; published: 3.56.\n" in labelled
    theirs = summary(run(*claims), ["lm.a"], run(entry("lm.a", -0.5)))
    assert "Ours: 0.000; ours on `gpt2-small`: −0.500; published: 3.56.\n" in theirs
    with pytest.raises(ValueError, match="claim_ids: got"):
        summary(run(*claims), ["lm.c"])
