"""The ledger on the page: a line of counts, then each claim with its verdict first.

Blocks that wrap, not a wide table, so that it reads on a phone; where styles are stripped, as on
GitHub, the same words stand below each other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import NamedTuple

from utils.ledger.results import FAILS, HOLDS, UNDECIDED, cells, counts

# White on these, and these on white, have a contrast of at least 4.5; the sign says the same.
COLOURS = {HOLDS: "#1a7f37", FAILS: "#b3261e", UNDECIDED: "#7a5c00"}
ROW = "display:flex;flex-wrap:wrap;gap:2px 14px;padding:8px 0;border-top:1px solid #8886"
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

    def __repr__(self) -> str:
        lines = [f"{counts(self.claims)}."]
        for claim in self.claims:
            verdict, published, figure = cells(claim)
            figures = f"ours {figure}; published {published}"
            lines.append(f"{verdict}: {claim['statement']}: {figures}")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        rows = "\n".join(map(_row, self.claims, self.rules))
        look = "text-align:left;max-width:60em;line-height:1.4;font-family:sans-serif"
        return f'<div style="{look}"><p><b>{counts(self.claims)}.</b></p>\n{rows}\n</div>'


def _row(claim: dict, rule: Rule) -> str:
    verdict, published, figure = map(escape, cells(claim))
    return (
        f'<div style="{ROW}">'
        f'<div style="flex:0 0 8.5em"><span style="{BADGE}{COLOURS[claim["verdict"]]}">'
        f"{verdict}</span></div>"
        f'<div style="flex:1 1 18em">{escape(claim["statement"])}'
        f"<details><summary>rule and source</summary>{escape(rule.words)} "
        f"<i>{escape(rule.source)}</i></details></div>"
        f'<div style="flex:1 1 14em"><div style="white-space:nowrap">ours <b>{figure}</b></div>'
        f"<div>published {published}</div></div></div>"
    )
