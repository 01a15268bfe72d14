"""Diagram of a circuit: roles as boxes with their heads inside, arrows by size of effect."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import plotly.graph_objects as go

from utils.plot_style import COLOURS, PNG_WIDTH, finish

END = "logits"
RAISES, LOWERS = "#B2182B", "#2166AC"  # the ends of the diverging colour scale
MARGIN, ROW_GAP, BOX_GAP = 40, 84, 30  # pixels, as everything below
LINE, PADDING = 18, 9
TITLE_CHAR, HEAD_CHAR = 7.6, 7.4
MAX_PER_LINE = 6


class Edge(NamedTuple):
    """An arrow: from one role to another (or "logits"), its effect, and the input it acts on."""

    sender: str
    receiver: str
    effect: float
    via: str = ""

    @property
    def label(self) -> str:
        return f"{self.via} {self.effect:+.2f}".strip().replace("-", "−")


@dataclass
class Box:
    """A role's place in the figure: level, lines of text, centre and size in pixels."""

    name: str
    level: int
    title: list[str]
    heads: list[str]
    x: float = 0.0
    y: float = 0.0
    width: float = 0.0

    @property
    def height(self) -> float:
        return LINE * (len(self.title) + len(self.heads)) + 2 * PADDING

    @property
    def text(self) -> str:
        return "<br>".join([f"<b>{line}</b>" for line in self.title] + self.heads)


def circuit_diagram(
    roles: Mapping[str, Sequence[object]],
    edges: Sequence[tuple],
    *,
    levels: Mapping[str, int],
    title: str,
    note: str = "",
) -> go.Figure:
    """Roles as boxes with their heads inside, early at the bottom, arrows as wide as their effect.

    `roles`: name to heads (printed with `str`); a role without heads is left out with its arrows.
    `edges`: (sender, receiver, effect) or (sender, receiver, effect, via) as "q", "k" or "v"; the
    receiver may be "logits", the box at the top. Red arrows have a positive effect, blue ones a
    negative one. `levels`: role to row, 0 the lowest; roles of a level stand side by side.
    ValueError: no role with heads, a role without a level, an arrow from or to no role, or one that
    does not go up.
    """
    edges = [Edge(*edge) for edge in edges]
    _check(roles, edges, levels)
    rows = _rows({name: heads for name, heads in roles.items() if len(heads)}, levels)
    height = _place(rows)
    boxes = {box.name: box for row in rows for box in row}
    edges = [e for e in edges if e.sender in boxes and e.receiver in boxes]

    fig = go.Figure()
    _draw_edges(fig, edges, _paths(edges, boxes, rows))
    for i, box in enumerate(boxes.values()):
        colour = "#404040" if box.name == END else COLOURS[i % len(COLOURS)]
        _draw_box(fig, box, colour)
    # a pixel is a unit: boxes fit their text, which does not stretch
    fig.update_xaxes(visible=False, range=[0, PNG_WIDTH], fixedrange=True)
    fig.update_yaxes(visible=False, range=[0, height], fixedrange=True)
    finish(fig, title, PNG_WIDTH, note)
    top = fig.layout.margin.t
    return fig.update_layout(width=PNG_WIDTH, height=height + top, margin=dict(l=0, r=0, b=0))


def _check(roles: Mapping, edges: Sequence[Edge], levels: Mapping[str, int]) -> None:
    if END in roles:
        raise ValueError(f"roles: {END!r} is the box at the top, give it no heads")
    if not any(len(heads) for heads in roles.values()):
        raise ValueError("roles: got no role with heads, want at least one")
    if missing := [name for name in roles if name not in levels]:
        raise ValueError(f"levels: got none for {', '.join(missing)}")
    for edge in edges:
        if edge.sender not in roles or edge.receiver not in (*roles, END):
            raise ValueError(f"edges: {edge.sender!r} to {edge.receiver!r} names no role")
        if edge.receiver != END and levels[edge.receiver] <= levels[edge.sender]:
            raise ValueError(
                f"edges: {edge.sender!r} to {edge.receiver!r} must go to a higher level, "
                f"got {levels[edge.sender]} to {levels[edge.receiver]}"
            )


def _rows(roles: Mapping[str, Sequence[object]], levels: Mapping[str, int]) -> list[list[Box]]:
    """Boxes level by level from the bottom, with text that fits side by side; logits last."""
    rows = []
    for level in sorted({levels[name] for name in roles}):
        names = [name for name in roles if levels[name] == level]
        room = (PNG_WIDTH - 2 * MARGIN - BOX_GAP * (len(names) - 1)) / len(names) - 2 * PADDING
        rows.append([_box(name, roles[name], len(rows), room) for name in names])
    return [*rows, [_box(END, [], len(rows), PNG_WIDTH)]]


def _box(name: str, heads: Sequence[object], level: int, room: float) -> Box:
    title = textwrap.wrap(name.replace("_", " "), max(8, int(room / TITLE_CHAR)))
    words = [str(head) for head in heads]
    longest = max((len(word) for word in words), default=0) + 2
    fits = max(1, min(MAX_PER_LINE, int(room / (longest * HEAD_CHAR))))
    per_line = -(-len(words) // -(-len(words) // fits)) if words else 1  # lines of equal length
    cut = [words[i : i + per_line] for i in range(0, len(words), per_line)]
    lines = ["  ".join(line) for line in cut]
    text = [TITLE_CHAR * len(line) for line in title] + [HEAD_CHAR * len(line) for line in lines]
    return Box(name, level, title, lines, width=max(110, max(text) + 2 * PADDING))


def _place(rows: list[list[Box]]) -> float:
    """Set each box's centre; returns the height of all rows."""
    y = MARGIN / 2
    for row in rows:
        tall = max(box.height for box in row)
        spare = PNG_WIDTH - 2 * MARGIN - sum(box.width for box in row)
        gap = max(spare / (len(row) + 1), 0)
        x = MARGIN + gap
        for box in row:
            box.x, box.y = x + box.width / 2, y + tall / 2
            x += box.width + gap
        y += tall + ROW_GAP
    return y - ROW_GAP + MARGIN / 2


def _paths(
    edges: Sequence[Edge], boxes: Mapping[str, Box], rows: list[list[Box]]
) -> list[list[tuple[float, float]]]:
    """Corners of each arrow: it leaves at the top, enters at the bottom, passes between boxes."""
    middles, used = [], {}
    for edge in edges:
        start, end = boxes[edge.sender], boxes[edge.receiver]
        corners = []
        for row in rows[start.level + 1 : end.level]:
            straight = start.x + (end.x - start.x) * (row[0].y - start.y) / (end.y - start.y)
            gap = min(_gaps(row), key=lambda x: abs(x - straight))
            used[gap, row[0].y] = n = used.get((gap, row[0].y), -1) + 1
            x = gap + 12 * (n // 2 + n % 2) * (-1) ** n  # beside those already there
            half = max(box.height for box in row) / 2
            corners += [(x, row[0].y - half), (x, row[0].y + half)]
        middles.append(corners)

    def ends(box: Box, mine: list[int], nearest: list[float]) -> dict[int, float]:
        """Where the arrows touch the box, from left to right as they go on."""
        ordered = [i for _, i in sorted(zip(nearest, mine, strict=True))]
        step = box.width / (len(ordered) + 1)
        return {i: box.x - box.width / 2 + step * (n + 1) for n, i in enumerate(ordered)}

    out, into = {}, {}
    for box in boxes.values():
        sent = [i for i, e in enumerate(edges) if e.sender == box.name]
        goes = [middles[i][0][0] if middles[i] else boxes[edges[i].receiver].x for i in sent]
        out |= ends(box, sent, goes)
        got = [i for i, e in enumerate(edges) if e.receiver == box.name]
        comes = [middles[i][-1][0] if middles[i] else boxes[edges[i].sender].x for i in got]
        into |= ends(box, got, comes)
    paths = []
    for i, edge in enumerate(edges):
        start, end = boxes[edge.sender], boxes[edge.receiver]
        first = (out[i], start.y + start.height / 2)
        paths.append([first, *middles[i], (into[i], end.y - end.height / 2)])
    return paths


def _gaps(row: list[Box]) -> list[float]:
    """x between the boxes of a row, and to the left and right of them."""
    inner = [(a.x + a.width / 2 + b.x - b.width / 2) / 2 for a, b in pairwise(row)]
    left, right = row[0].x - row[0].width / 2, row[-1].x + row[-1].width / 2
    return [max(left - 22, 8), *inner, min(right + 22, PNG_WIDTH - 8)]


def _draw_edges(
    fig: go.Figure, edges: Sequence[Edge], paths: list[list[tuple[float, float]]]
) -> None:
    largest = max((abs(e.effect) for e in edges), default=0) or 1
    placed: list[tuple[float, float]] = []
    for edge, path in zip(edges, paths, strict=True):
        colour = RAISES if edge.effect > 0 else LOWERS
        width = 1 + 5 * abs(edge.effect) / largest
        (ax, ay), (x, y) = path[-2:]
        if len(path) > 2:  # as far as the last stretch, so that the joint has no gap
            corners = [*path[:-1], ((ax + x) / 2, (ay + y) / 2)]
            line = "M " + " L ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
            fig.add_shape(type="path", path=line, line=dict(color=colour, width=width))
        arrow = dict(showarrow=True, arrowcolor=colour, arrowwidth=width, arrowhead=2)
        size = max(0.5, 1.6 / width**0.5)
        place = dict(x=x, y=y, ax=ax, ay=ay, axref="x", ayref="y", text="")
        fig.add_annotation(**place, **arrow, arrowsize=size)
        placed.append(_label_place(path, placed))
    for edge, (x, y) in zip(edges, placed, strict=True):  # over all arrows
        fig.add_annotation(
            x=x,
            y=y,
            text=edge.label,
            showarrow=False,
            font=dict(size=12),
            bgcolor="white",
            borderpad=1,
        )


def _label_place(
    path: list[tuple[float, float]], placed: list[tuple[float, float]]
) -> tuple[float, float]:
    """A point on the arrow's first stretch where no other label stands, else its middle."""
    (x0, y0), (x1, y1) = path[:2]
    spots = [(x0 + t * (x1 - x0), y0 + t * (y1 - y0)) for t in (0.45, 0.7, 0.22)]
    free = (s for s in spots if all(abs(s[0] - x) > 66 or abs(s[1] - y) > 17 for x, y in placed))
    return next(free, spots[0])


def _draw_box(fig: go.Figure, box: Box, colour: str) -> None:
    half = box.width / 2, box.height / 2
    r, g, b = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    # white below the tint, so that no arrow shows through
    for fill in ("white", f"rgba({r},{g},{b},0.14)"):
        fig.add_shape(
            type="rect",
            x0=box.x - half[0],
            x1=box.x + half[0],
            y0=box.y - half[1],
            y1=box.y + half[1],
            line=dict(color=colour, width=1.5),
            fillcolor=fill,
        )
    fig.add_annotation(x=box.x, y=box.y, text=box.text, showarrow=False, align="center")
