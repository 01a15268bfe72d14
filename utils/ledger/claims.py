"""The ledger: every claim a notebook tested, the published figure, ours, and the verdict.

    ledger = Ledger("project-1-induction-heads", CLAIMS, model_label(model), weights_digest(model))
    ledger.record("lm.ablation", lost, control)
    ledger.record_heads("induction", induction_heads)
    ledger.table()

`CLAIMS` come from the project's claims file. Every call rewrites
`build/results/<project>/<model label>.json`; MECH_INTERP_RESULTS names another folder.
"""

import inspect
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from numbers import Integral, Real
from pathlib import Path
from typing import NamedTuple

import numpy as np

from utils.ledger.results import FAILS, HOLDS, UNDECIDED, merge_seeds, plain, read_json, write_json
from utils.ledger.rules import Verdict, every
from utils.ledger.table import LedgerTable, Rule
from utils.session import ROOT
from utils.typed import checked

VERDICTS = {True: HOLDS, False: FAILS, None: UNDECIDED}  # what a rule gives -> what the file says
AS_RULED = {words: verdict for verdict, words in VERDICTS.items()}


class Claim(NamedTuple):
    """A published claim and our rule, in words and computed; the published figure decides nothing.

    `holds` takes what the notebook records, the reported figure first, and gives True, False, or
    None where the figures cannot tell (`utils.ledger.rules`). `rule` says the same in words; what
    follows "Holds when " in it stands beside the verdict.
    """

    statement: str
    source: str
    rule: str
    holds: Callable[..., Verdict]
    published: float | str | None = None
    published_model: str | None = None
    needs: tuple[str, ...] = ()  # claims without which this one does not hold
    only_for: str | None = None  # the one model that the claim is about
    n_of: str | None = None  # what n counts, where that is not prompts of the ledger's model
    quantity: str | None = None  # what the reported figure is, in few words: its label


class Ledger:
    """Claims and heads of one run of one notebook on one model, kept in a JSON file."""

    @checked
    def __init__(self, project: str, claims: Mapping[str, Claim], model_label: str, weights: str):
        for name, value in (("project", project), ("model_label", model_label)):
            if not re.fullmatch(r"[\w][\w.-]*", value):
                raise ValueError(f"{name}: got {value!r}, want a plain file name")
        folder = Path(os.environ.get("MECH_INTERP_RESULTS") or ROOT / "build" / "results")
        self.path = folder / project / f"{model_label}.json"
        self.claims = claims
        versions = {package: version(package) for package in ("torch", "transformer_lens")}
        self.data = {"model": model_label, "weights": weights, "versions": versions}
        self.data |= {"claims": [], "heads": {}}
        write_json(self.path, self.data)  # so that no older run's figures survive

    def record(
        self, claim_id: str, measured: float | tuple, *others: object, **named: object
    ) -> None:
        """Report `measured`, a number or an `Estimate`; the claim's rule decides from everything.

        It does not hold when a claim that it needs does not, or a figure is None, NaN or (if it is
        reported) infinite; it is undecided where its rule is, or a claim that it needs. A second
        record of a claim replaces the first; if the verdict changes, what needs it has to be
        recorded again. Raises ValueError for an unknown id, or when a claim that it needs was not
        recorded, or for an error below zero or infinite; TypeError for figures that are not the
        rule's, and a rule that gives anything but True, False or None.
        """
        if not isinstance(claim_id, str) or claim_id not in self.claims:
            raise ValueError(f"claim_id: got {claim_id!r}, want one of {', '.join(self.claims)}")
        claim = self.claims[claim_id]
        entries = {entry["id"]: entry for entry in self.data["claims"]}
        before = entries.get(claim_id)
        for other in claim.needs:
            if other not in entries:
                raise ValueError(f"{claim_id} needs {other}, which was not recorded before it")
        if isinstance(measured, bool) or not (
            measured is None or isinstance(measured, Real | tuple)
        ):
            raise TypeError(
                f"{claim_id}: measured must be a number or an Estimate, got {measured!r}"
            )
        for figure in (measured, *others, *named.values()):
            _check_figure(claim_id, figure)
        value, stderr, n = measured if isinstance(measured, tuple) else (measured, None, None)
        known = plain(value) is not None and all(map(_known, (*others, *named.values())))
        needed = every(*(AS_RULED[entries[other]["verdict"]] for other in claim.needs))
        holds = False
        if known and needed is not False:
            try:
                holds = claim.holds(measured, *others, **named)
            except (AttributeError, TypeError) as error:
                told = f"{claim_id}: its rule cannot use these figures: {error}"
                raise TypeError(told) from error
        if not (holds is None or isinstance(holds, bool | np.bool_)):
            raise TypeError(f"{claim_id}: its rule must give True, False or None, got {holds!r}")
        entries[claim_id] = {
            "id": claim_id,
            "statement": claim.statement,
            "source": claim.source,
            "quantity": claim.quantity,
            "published": claim.published,
            "published_model": claim.published_model,
            "measured": plain(value),
            "stderr": plain(stderr),
            "n": n,
            "n_of": claim.n_of,
            "others": _named_figures(claim.holds, (measured, *others), named),
            "for_want_of": [
                self.claims[other].statement
                for other in claim.needs
                if entries[other]["verdict"] != HOLDS
            ],
            "holds_when": claim.rule.partition("Holds when ")[2].rstrip("."),
            "verdict": VERDICTS[every(needed, holds)],
        }
        if before and before["verdict"] != entries[claim_id]["verdict"]:
            for other in [i for i in entries if claim_id in self.claims[i].needs]:
                del entries[other]  # decided by the earlier verdict: to be recorded again
        self.data["claims"] = [entries[i] for i in self.claims if i in entries]
        write_json(self.path, self.data)

    @checked
    def record_heads(self, role: str, heads: Iterable[object]) -> None:
        """Record the heads of a role, such as "previous_token", as labels like "L5H5"."""
        if not re.fullmatch(r"[a-z]+(_[a-z]+)*", role):
            raise ValueError(f"role: got {role!r}, want words like 'previous_token'")
        labels = [str(head) for head in heads]
        wrong = [label for label in labels if not re.fullmatch(r"L\d+H\d+", label)]
        if wrong:
            raise ValueError(f"heads: got {wrong}, want labels such as L5H5")
        self.data["heads"][role] = labels
        write_json(self.path, self.data)

    @checked
    def table(self, seeds: str | Path | None = None, own_seed: int = 0) -> LedgerTable:
        """The claims for display; with the file of other seeds, toy claims show their spread.

        What the file has of `own_seed`, the seed of this run, does not count a second time.
        """
        data = self.data
        if seeds is not None and Path(seeds).exists():
            others = {seed: run for seed, run in read_json(seeds).items() if seed != str(own_seed)}
            data = merge_seeds(data, list(others.values())) if others else data
        shown = [self.claims[entry["id"]] for entry in data["claims"]]
        needed = [[self.claims[other].statement for other in claim.needs] for claim in shown]
        rules = [
            Rule(claim.source, claim.rule + "".join(f" Needs: “{s}”." for s in statements))
            for claim, statements in zip(shown, needed, strict=True)
        ]
        return LedgerTable(data["claims"], rules)


def _named_figures(rule: Callable, figures: tuple, named: Mapping) -> dict[str, float | None]:
    """What the rule looks at beside the figure reported, by its own names: numbers and means."""
    _, *given = inspect.signature(rule).bind(*figures, **named).arguments.items()
    means = {name: x[0] if isinstance(x, tuple) else x for name, x in given}
    numbers = {k: x for k, x in means.items() if isinstance(x, Real) and not isinstance(x, bool)}
    return {name: plain(x) for name, x in numbers.items()}


def _check_figure(claim_id: str, figure: object) -> None:
    """Raise ValueError for an estimate whose standard error or count cannot be one."""
    if isinstance(figure, tuple):
        if len(figure) != 3:
            raise ValueError(f"{claim_id}: an estimate is (mean, stderr, n), got {figure!r}")
        _, stderr, n = figure
        if not (isinstance(stderr, Real) and (math.isnan(stderr) or 0 <= stderr < math.inf)):
            raise ValueError(f"{claim_id}: a standard error must be 0 or more, got {stderr!r}")
        if not isinstance(n, Integral) or n < 0:
            raise ValueError(f"{claim_id}: n must be a count, got {n!r}")


def _known(figure: object) -> bool:
    """False for None and NaN (which differs from itself), or an estimate with such a mean."""
    figure = figure[0] if isinstance(figure, tuple) else figure
    return figure is not None and not (isinstance(figure, Real) and figure != figure)
