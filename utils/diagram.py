"""Diagram of a circuit: roles as boxes with their heads inside, arrows by size of effect.

Boxes stand in rows by level, at most three in one. An arrow that skips a row gets a place of its
own there, a box without width: so it never crosses a box, for each stretch of it lies between two
rows or in its place. Arrows are straight where there is room, else curves that leave and arrive
upright. Boxes are as wide as their text needs on a phone, and stretch with the page.
"""

import itertools
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import plotly.graph_objects as go

from utils.look import escaped, role_in_words, titled
from utils.typed import checked

LOGITS, INK = "logits", "#222222"
RAISES, LOWERS = "#B2182B", "#2166AC"  # the ends of the diverging colour scale
PAGE, BESIDE = 350, 3  # pixels across a phone, boxes in a row
GAP, ROW_GAP, LINE, LETTER = 14, 80, 16, 7  # pixels: gaps of boxes, of rows; a line, a letter
APART, OFF = 24, 2  # pixels: between arrows at a box, and from a box to the tip of an arrow
CURVE = [i / 12 for i in range(13)]  # the points at which a curve is drawn

Roles = Mapping[str, Sequence[object]]
Path = list[tuple[float, float]]


class Family(NamedTuple):
    """Roles that do the same kind of work share a colour; no arrow has it."""

    colour: str
    words: str
    roles: tuple[str, ...]


FAMILIES = {
    "before": Family("#946c00", "token before", ("previous_token",)),
    "again": Family("#0e7c86", "repetition", ("duplicate_token", "induction")),
    "inhibition": Family("#7b3fa0", "where not to look", ("s_inhibition",)),
    "for": Family(
        "#3f7d20",
        "writes for the answer",
        ("name_mover", "backup_name_mover", "giver_suppressor", "s_reader", "amplifier"),
    ),
    "against": Family(
        "#5a6472", "writes against it", ("negative_name_mover", "subject_mover", "damper")
    ),
}


@dataclass
class Box:
    """A role with its heads, or the place of a passing arrow; sizes and edges in pixels."""

    row: int
    text: str = ""
    width: float = 0
    height: float = 0
    x: float = 0  # of its middle
    low: float = 0
    high: float = 0


@checked
def circuit_diagram(
    roles: Roles,
    edges: Sequence[tuple],
    *,
    levels: Mapping[str, int],
    title: str,
    places: Mapping[str, str] | None = None,
) -> go.Figure:
    """Roles as boxes with their heads inside, early at the bottom, arrows as wide as their effect.

    `roles`: name to heads (printed with `str`); a role without heads is left out with its arrows.
    `edges`: (sender, receiver, effect) or (sender, receiver, effect, via) as "q", "k" or "v"; the
    receiver may be "logits", the box at the top. Red arrows have a positive effect, blue ones a
    negative one. `levels`: role to row, 0 the lowest; roles of a level stand side by side, or in
    two rows if there are many. `places`: role to the position at which its heads work, which stands
    behind its name. A box has the colour of its family, which a key under the title names.
    ValueError: no role with heads, a role without a level, an arrow from or to no role, or one that
    does not go up.
    """
    _check(roles, edges, levels)
    members = {name: heads for name, heads in roles.items() if len(heads)}
    boxes = _boxes(members, levels, places or {})
    edges = [edge for edge in edges if edge[0] in boxes and edge[1] in boxes]
    rows = [[box for box in boxes.values() if box.row == i] for i in range(boxes[LOGITS].row + 1)]
    height = _place(rows)
    chains = [_chain(boxes[sender], boxes[receiver], rows) for sender, receiver, *_ in edges]
    _untangle(rows, chains)

    fig = go.Figure()
    _draw_arrows(fig, edges, chains)
    for name, box in boxes.items():
        colour = next((f.colour for f in FAMILIES.values() if name in f.roles), INK)
        corners = dict(x0=box.x - box.width / 2, x1=box.x + box.width / 2, y0=box.low, y1=box.high)
        look = dict(line=dict(color=colour, width=1.5), fillcolor=f"{colour}24")
        label = dict(text=box.text, font_size=11)
        fig.add_shape(type="rect", label=label, **corners, **look)
    # on a phone a pixel is a unit: boxes fit their text, which does not stretch
    fig.update_xaxes(visible=False, range=[0, PAGE], fixedrange=True)
    fig.update_yaxes(visible=False, range=[0, height], fixedrange=True)
    fig.update_layout(showlegend=False, margin=dict(l=0, r=0, b=0))
    key = _key(boxes, edges)
    titled(fig, title, "", 18 * len(key), height=height + 82)
    return fig.update_layout(title_subtitle_text="<br>".join(key))


def _check(roles: Roles, edges: Sequence[tuple], levels: Mapping[str, int]) -> None:
    if LOGITS in roles:
        raise ValueError(f"roles: {LOGITS!r} is the box at the top, give it no heads")
    if not any(len(heads) for heads in roles.values()):
        raise ValueError("roles: got no role with heads, want at least one")
    if missing := [name for name in roles if name not in levels]:
        raise ValueError(f"levels: got none for {', '.join(missing)}")
    for sender, receiver, *_ in edges:
        arrow = f"edges: {sender!r} to {receiver!r}"
        if sender not in roles or receiver not in (*roles, LOGITS):
            raise ValueError(f"{arrow} names no role")
        if receiver != LOGITS and levels[receiver] <= levels[sender]:
            got = f"{levels[sender]} to {levels[receiver]}"
            raise ValueError(f"{arrow} must go to a higher level, got {got}")


def _boxes(roles: Roles, levels: Mapping[str, int], places: Mapping[str, str]) -> dict[str, Box]:
    """Boxes from the lowest row to the logits, with text wrapped so that a row fits a phone."""
    boxes: dict[str, Box] = {}
    row = 0
    for level in sorted({levels[name] for name in roles}):
        names = [name for name in roles if levels[name] == level]
        n_rows = -(-len(names) // BESIDE)
        for i, name in enumerate(names):
            beside = -(-len(names) // n_rows)
            room = int(((PAGE - GAP) / beside - GAP) / LETTER) - 1  # letters in a line
            header = textwrap.wrap(role_in_words(name), room)
            if name in places:  # behind the name, or below it: "at END" is not broken
                place = f"at {places[name]}"
                ended = f"{header[-1]} {place}"
                header[-1:] = [ended] if len(ended) <= room else [header[-1], place]
            heads = textwrap.wrap("  ".join(map(str, roles[name])), min(room, 28))
            marked = [*(f"<b>{escaped(line)}</b>" for line in header), *map(escaped, heads)]
            width = max(70, LETTER * (max(map(len, header + heads)) + 1))
            height = LINE * (len(header + heads) + 1)
            boxes[name] = Box(row + i // beside, "<br>".join(marked), width, height)
        row += n_rows
    # as wide as the page: each arrow has its own end
    return boxes | {LOGITS: Box(row, f"<b>{LOGITS}</b>", PAGE - 2 * GAP, 2 * LINE)}


def _place(rows: list[list[Box]]) -> float:
    """Spread each row over the page, its boxes of one height; returns the height of all."""
    low = GAP
    for row in rows:
        height = max(box.height for box in row)
        gap = (PAGE - sum(box.width for box in row)) / (len(row) + 1)
        left = gap
        for box in row:
            box.x, box.low, box.high = left + box.width / 2, low, low + height
            left += box.width + gap
        low += height + ROW_GAP
    return low - ROW_GAP + GAP


def _chain(start: Box, end: Box, rows: list[list[Box]]) -> list[Box]:
    """The two boxes and a new place in each row between, on the straight line that joins them."""
    slope = (end.x - start.x) / (end.low - start.low)
    chain = [start]
    for row in rows[start.row + 1 : end.row]:
        chain.append(Box(row[0].row, x=start.x + slope * (row[0].low - start.low)))
        row.append(chain[-1])
    return [*chain, end]


def _untangle(rows: list[list[Box]], chains: list[list[Box]]) -> None:
    """Order each row so that few arrows cross; of equal orders the earlier one stays."""
    for i, row in enumerate(rows):
        rows[i] = sorted(row, key=lambda box: box.x)
    _place(rows)
    for i in [*range(len(rows)), *reversed(range(len(rows)))]:
        orders = itertools.permutations(rows[i]) if len(rows[i]) <= 6 else [rows[i]]
        tried = []
        for order in map(list, orders):
            _place([*rows[:i], order, *rows[i + 1 :]])
            tried.append((_crossings(chains), len(tried), order))
        rows[i] = min(tried)[2]
        _place(rows)


def _crossings(chains: list[list[Box]]) -> int:
    """How often arrows cross between two rows."""
    stretches = [(a.row, a.x, b.x) for chain in chains for a, b in itertools.pairwise(chain)]
    return sum(
        row == other and (low - low2) * (high - high2) < 0
        for (row, low, high), (other, low2, high2) in itertools.combinations(stretches, 2)
    )


def _ports(chains: list[list[Box]], at: int, towards: int) -> list[float]:
    """x where each arrow touches its box `at` one end; the more left it goes, the more left.

    Where it can go straight, unless arrows would meet there: then they share the box evenly.
    """
    ports = [0.0] * len(chains)
    for box in {id(chain[at]): chain[at] for chain in chains}.values():
        same = [i for i, chain in enumerate(chains) if chain[at] is box]
        same.sort(key=lambda i: chains[i][towards].x)
        wanted = [_straight(box, chains[i][towards]) for i in same]
        if any(right - left < APART for left, right in itertools.pairwise(wanted)):
            shares = [rank / (len(same) + 1) - 0.5 for rank in range(1, len(same) + 1)]
            wanted = [box.x + box.width * share for share in shares]
        for i, x in zip(same, wanted, strict=True):
            ports[i] = x
    return ports


def _straight(box: Box, other: Box) -> float:
    """x in a box nearest to an upright line through both, in the middle of what they share."""
    rooms = [max(b.width - APART, 0) / 2 for b in (box, other)]
    low = max(box.x - rooms[0], other.x - rooms[1])
    high = min(box.x + rooms[0], other.x + rooms[1])
    x = min(max((box.x + other.x) / 2, low), high) if low <= high else other.x
    return min(max(x, box.x - rooms[0]), box.x + rooms[0])


def _key(boxes: Mapping[str, Box], edges: Sequence[tuple]) -> list[str]:
    """Lines that say what colours, letters and widths in the diagram mean."""
    used = [family for family in FAMILIES.values() if set(family.roles) & set(boxes)]
    signs = [(RAISES, "positive", max), (LOWERS, "negative", min)]
    effects = [effect for _, _, effect, *_ in edges]
    arrows = [
        (colour, f"▲ {sign} effect") for colour, sign, end in signs if end(effects, default=0) != 0
    ]
    families = [(f.colour, f"■ {f.words}") for f in used]
    lines = [part for part in (families[:3], families[3:], arrows) if part]
    marked = [[f'<span style="color:{colour}">{text}</span>' for colour, text in x] for x in lines]
    via = "q, k, v: through the receiver's queries, keys, values"
    said = [via] if any(e[3:] for e in edges) else []
    said += ["number and width: share of the logit difference lost"] if edges else []
    return ["   ".join(line) for line in marked] + said


def _draw_arrows(fig: go.Figure, edges: Sequence[tuple], chains: list[list[Box]]) -> None:
    largest = max((abs(effect) for _, _, effect, *_ in edges), default=0) or 1
    ports = zip(_ports(chains, 0, 1), _ports(chains, -1, -2), strict=True)
    paths = []
    widths = [1 + 5 * abs(effect) / largest for _, _, effect, *_ in edges]
    heads = [10 + 3 * width for width in widths]
    for (first, *between, last), (x0, x1), head in zip(chains, ports, heads, strict=True):
        path = [(place.x, y) for place in between for y in (place.low, place.high)]
        paths.append([(x0, first.high), *path, (x1, last.low - OFF - 0.8 * head)])
    taken = []
    for i, ((sender, receiver, effect, *via), path) in enumerate(zip(edges, paths, strict=True)):
        colour = RAISES if effect > 0 else LOWERS
        line = dict(width=widths[i], color=colour, simplify=False)
        curve = [p for a, b in _stretches(path) for p in _along(a, b, CURVE)]
        tip = path[-1][0], path[-1][1] + 0.8 * heads[i]
        x, y = zip(*curve, (None, None), tip, strict=True)  # a gap: the line ends within the head
        sizes = [0] * (len(x) - 1) + [heads[i]]
        head = dict(symbol="arrow", size=sizes, opacity=1, line_width=0)
        text = " ".join([*map(escaped, via), f"{effect:+.2f}"]).strip().replace("-", "−")
        words = f"{role_in_words(sender)} to {role_in_words(receiver)}: {text}"
        look = dict(line=line, marker=head, name=words, hoverinfo="skip")  # read out, not drawn
        fig.add_scatter(x=x, y=y, mode="lines+markers", **look)
        taken.append(_spot(path, [*paths[:i], *paths[i + 1 :]], taken))
        font = dict(size=11, color=colour)  # that of its arrow
        at = dict(x=taken[-1][0], y=taken[-1][1])
        fig.add_annotation(text=text, showarrow=False, bgcolor="white", font=font, **at)


def _spot(path: Path, others: list[Path], taken: Path) -> tuple[float, float]:
    """Where an arrow's label stands: on the arrow, off other labels, and off other arrows.

    Only between two rows: where an arrow passes a row it runs between boxes.
    """
    shares = (0.5, 0.16, 0.88, 0.33, 0.67)
    spots = [spot for a, b in _stretches(path) for spot in _along(a, b, shares)]
    apart = [s for s in spots if all(abs(s[0] - x) > 50 or abs(s[1] - y) > 16 for x, y in taken)]
    steps = [i / 40 for i in range(41)]
    passing = [p for other in others for a, b in _stretches(other) for p in _along(a, b, steps)]
    clear = [s for s in apart if all(abs(s[0] - x) > 27 or abs(s[1] - y) > 9 for x, y in passing)]
    return (clear or apart or spots)[0]


def _stretches(path: Path) -> list[tuple]:
    return list(zip(path[::2], path[1::2], strict=True))


def _along(a: tuple, b: tuple, shares: Sequence[float]) -> Path:
    """Points of a stretch, which is upright at both ends."""
    bent = [t * t * (3 - 2 * t) for t in shares]
    return [
        (a[0] + s * (b[0] - a[0]), a[1] + t * (b[1] - a[1]))
        for s, t in zip(bent, shares, strict=True)
    ]
