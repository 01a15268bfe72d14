"""Results for maintainers: what differs between two runs, and a README's tables."""

import math
from collections.abc import Sequence
from pathlib import Path

from utils.ledger.results import (
    FAILS,
    HOLDS,
    SIGNS,
    UNDECIDED,
    cells,
    counts,
    quantity,
    read_json,
    rule,
    verdict,
    why,
)
from utils.look import role_in_words
from utils.models.load import SMOLLM2_NAME
from utils.models.offline import GGUF_IS

PAPERS = "gpt2-small"  # the model that most published figures are of


def compare(fresh: dict, committed: dict) -> list[str]:
    """Differences between a fresh run's ledger and the committed one; an empty list when none.

    Claims, verdicts, weights and roles must be the same. A figure may differ by 0.02, by 5 % of
    the committed one, or by four standard errors, whichever is most. A claim averaged over n seeds
    stands against a single one, so four standard deviations (stderr * sqrt(n)) count instead, and
    if the seeds disagreed its verdict is free. The heads of a role may differ in one head, or in a
    fifth of them if that is more: scores near a threshold fall on either side. Counts must be the
    same, and what else a rule looks at within a tenth or 0.05 (a toy's may be anything).
    """
    found = []
    if fresh["weights"] != committed["weights"]:
        found.append(f"weights: {fresh['weights']}, committed {committed['weights']}")
    new = {c["id"]: c for c in fresh["claims"]}
    old = {c["id"]: c for c in committed["claims"]}
    found += [f"{i}: only in the fresh run" for i in new if i not in old]
    found += [f"{i}: only in the committed run" for i in old if i not in new]
    for claim_id in (i for i in new if i in old):
        found += _compare_claim(new[claim_id], old[claim_id])
    for role in sorted({*fresh["heads"], *committed["heads"]}):
        a, b = (set(side["heads"].get(role, ())) for side in (fresh, committed))
        one_sided = (role in fresh["heads"]) != (role in committed["heads"])
        if one_sided or len(a ^ b) > max(1, len(b) / 5):
            found.append(f"heads, {role}: {sorted(a)}, committed {sorted(b)}")
    return found


def _compare_claim(new: dict, old: dict) -> list[str]:
    found = []
    held, of = old.get("holds_in", "1/1").split("/")
    seeds_agree = held in ("0", of)
    if new["verdict"] != old["verdict"] and seeds_agree:
        found.append(f"{new['id']}: {verdict(new)}, committed {verdict(old)}")
    if "holds_in" not in old:
        found += _compare_others(new, old)
    a, b = new["measured"], old["measured"]
    if a is None or b is None:
        return found if a is b else [*found, f"{new['id']}: measured {a}, committed {b}"]
    spread = old["stderr"] or 0.0
    if "holds_in" in old:
        spread *= math.sqrt(old["n"])
    tolerance = max(0.02, 0.05 * abs(b), 4 * spread)
    if abs(a - b) > tolerance:
        found.append(f"{new['id']}: measured {a}, committed {b} ± {tolerance:.2g}")
    return found


def _compare_others(new: dict, old: dict) -> list[str]:
    """Counts, and what else the rule looks at."""
    figures = [side.get("others") or {} for side in (new, old)]
    pairs = {name: [figure.get(name) for figure in figures] for name in {*figures[0], *figures[1]}}
    apart = {
        name: (a, b)
        for name, (a, b) in pairs.items()
        if a != b and (None in (a, b) or abs(a - b) > max(0.05, 0.1 * abs(b)))
    }
    if new["n"] != old["n"]:
        apart["n"] = (new["n"], old["n"])
    return [f"{new['id']}, {name}: {a}, committed {b}" for name, (a, b) in apart.items()]


def summary(ledger: dict, claim_ids: Sequence[str], papers: dict | None = None) -> str:
    """How many claims hold, the named ones with their figures, and, folded, those that do not hold.

    A list, which a phone shows whole. `papers` is the ledger of the papers' own model, if a run of
    it is committed. Raises ValueError for an id that is not in the ledger.
    """
    claims = {claim["id"]: claim for claim in ledger["claims"]}
    if unknown := [i for i in claim_ids if i not in claims]:
        raise ValueError(f"claim_ids: got {unknown}, have {', '.join(claims)}")
    lines = [f"**{counts(claims.values())}** for {in_full(ledger['model'])}.", ""]
    lines[0] += " Some of them:" * bool(claim_ids)
    theirs = {claim["id"]: claim for claim in papers["claims"]} if papers else {}
    for claim in (claims[i] for i in claim_ids):
        _, published, ours = cells(claim)
        figures = [_labelled(claim, ours)]
        if claim["id"] in theirs:
            figures.append(f"ours on `{PAPERS}`: {cells(theirs[claim['id']])[2]}")
        figures += [f"published: {published}"] * (published != "–")
        figures += [rule(claim)] * (claim["verdict"] != HOLDS and bool(rule(claim)))
        lines.append(f"- {SIGNS[claim['verdict']]} {claim['statement']}.<br>{'; '.join(figures)}.")
    for verdict_, head in ((FAILS, "do not hold"), (UNDECIDED, "are undecided")):
        named = [c for c in claims.values() if c["verdict"] == verdict_]
        if named:
            lines += ["", f"<details><summary>Claims that {head}</summary>", ""]
            lines += [f"- {c['statement']}.<br>{_labelled(c, with_others(c))}." for c in named]
            lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def in_full(label: str) -> str:
    """A model's label, and behind the offline model's what it is."""
    return f"`{label}`" + f" ({GGUF_IS})" * (label == SMOLLM2_NAME)


def _labelled(claim: dict, figure: str) -> str:
    """Our figure behind the name of what it is."""
    label = quantity(claim)
    return f"{label[0].upper()}{label[1:]}: ours {figure}" if label else f"Ours: {figure}"


def with_others(claim: dict) -> str:
    """Our figure and, where the claim does not hold, what else its rule looks at."""
    more = "" if claim["verdict"] == HOLDS else why(claim)
    return cells(claim)[2] + (f"{';' if more.startswith('holds') else ','} {more}" if more else "")


def markdown_table(ledger: dict | Path, papers: dict | None = None) -> str:
    """The ledger's claims and heads as Markdown, for a README.

    `papers` is the ledger of the papers' own model, if a run of it is committed: one more column.
    """
    data = ledger if isinstance(ledger, dict) else read_json(ledger)
    theirs = {claim["id"]: claim for claim in papers["claims"]} if papers else {}
    head = ["verdict", "claim", "what is measured", "published", "ours ± standard error (n)"]
    rows = [head + [f"ours on {PAPERS}"] * bool(theirs)]
    rows.append(["---"] * len(rows[0]))
    for c in data["claims"]:
        verdict_, published, _ = cells(c)
        row = [verdict_, c["statement"], quantity(c) or "–", published, with_others(c)]
        if theirs:
            other = theirs.get(c["id"])
            row.append(" ".join(cells(other)[::2]) if other else "–")
        rows.append([_escape(text) for text in row])
    versions = ", ".join(f"{name} {number}" for name, number in data["versions"].items())
    lines = [
        f"Model: {in_full(data['model'])}; {versions}.",
        "",
        f"{counts(data['claims'])}.",
        "",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n" + heads_table(data)


def heads_table(ledger: dict) -> str:
    """The heads of each role as Markdown; nothing where the ledger names none."""
    rows = [
        f"| {role_in_words(role)} | {', '.join(heads) or 'none'} |\n"
        for role, heads in ledger["heads"].items()
    ]
    return "".join(["\n| role | heads |\n| --- | --- |\n", *rows]) if rows else ""


def _escape(text: str) -> str:
    return text.replace("|", "\\|")
