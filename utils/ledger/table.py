"""The ledger on the page: counts, links to what does not hold, each claim with its verdict first.

Columns at the same place in every row, and below each other on a phone; where styles are stripped,
as on GitHub, the same words stand below each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from utils.ledger.results import FAILS, HOLDS, SIGNS, UNDECIDED, cells, counts, quantity, seeds, why

# White on these, and these on white, have a contrast of at least 4.5; the sign says the same.
COLOURS = {HOLDS: "#1a7f37", FAILS: "#b3261e", UNDECIDED: "#7a5c00"}
LOOK = "text-align:left;max-width:60em;line-height:1.4;font-family:sans-serif"
ROW = "display:flex;flex-wrap:wrap;gap:2px 10px;padding:8px 0;border-top:1px solid #8886"
COLUMN = "minmax(min(100%,18em),1fr)"  # as many as there is room for, all of one width
BESIDE = f"flex:1 1 20em;display:grid;grid-template-columns:repeat(auto-fit,{COLUMN});gap:2px 14px"
BADGE = "color:#fff;border-radius:4px;padding:1px 7px;white-space:nowrap;background:"


class Rule(NamedTuple):
    """Where a claim comes from, and our rule for it in words."""

    source: str
    words: str


@dataclass(frozen=True, repr=False)
class LedgerTable:
    """Entries of a ledger and the rule of each; the last expression of a cell."""

    claims: Sequence[dict]
    rules: Sequence[Rule]
    name: str = "claim"  # tells its anchors from those of other ledgers in the page

    def __repr__(self) -> str:
        lines = [f"{counts(self.claims)}."]
        for claim in self.claims:
            verdict, published, figure = cells(claim)
            figures = f"ours {' '.join(filter(None, (figure, why(claim))))}; published {published}"
            label = f" ({quantity(claim)})" if quantity(claim) else ""
            lines.append(f"{verdict}: {claim['statement']}{label}: {figures}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        ids = [escape(f"{self.name}-{i}") for i, _ in enumerate(self.claims, start=1)]
        rows = "\n".join(map(_row, ids, self.claims, self.rules))
        links = "".join(
            _links(
                words,
                [(x, c) for x, c in zip(ids, self.claims, strict=True) if c["verdict"] == verdict],
            )
            for words, verdict in (("Do not hold", FAILS), ("Undecided", UNDECIDED))
        )
        return f'<div style="{LOOK}"><p><b>{counts(self.claims)}.</b></p>{links}\n{rows}\n</div>'


def _links(words: str, claims: list[tuple[str, dict]]) -> str:
    items = (f'<li><a href="#{x}">{escape(claim["statement"])}</a></li>' for x, claim in claims)
    return f"<p>{words}:</p><ul>{''.join(items)}</ul>" if claims else ""


def _row(anchor: str, claim: dict, rule: Rule) -> str:
    _, published, figure = map(escape, cells(claim))
    badge = f"{SIGNS[claim['verdict']]} {claim['verdict']}"
    decides = "" if claim["verdict"] == HOLDS else why(claim)
    more = "".join(f"<div>{escape(text)}</div>" for text in (decides, seeds(claim)) if text)
    return (
        f'<div id="{anchor}" style="{ROW}">'
        f'<div style="flex:0 0 9em"><span style="{BADGE}{COLOURS[claim["verdict"]]}">'
        f"{badge}</span></div>"
        f'<div style="{BESIDE}"><div>{escape(claim["statement"])}'
        f"<details><summary>rule and source</summary>{escape(rule.words)} "
        f"<i>{escape(rule.source)}</i></details></div>"
        f"<div><i>{escape(quantity(claim))}</i>"
        f'<div style="white-space:nowrap">ours: <b>{figure}</b></div>'
        f"{more}<div>published: {published}</div></div></div></div>"
    )
