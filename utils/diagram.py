"""Diagram of a circuit: roles as boxes with their heads inside, arrows by size of effect.

Boxes stand in rows by level. An arrow that skips a row gets a place of its own there, like a box
without width, so it never crosses a box: every stretch of it lies between two rows, or in its place.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from utils.plotting import COLOURS, PNG_WIDTH

END = "logits"
RAISES, LOWERS = "#B2182B", "#2166AC"  # the ends of the diverging colour scale
GAP, ROW_GAP, LINE, CHAR = 30, 84, 18, 7.6  # pixels, as everything below; a line, a bold letter
LABEL = (66, 17)  # room that an arrow's label needs


class Edge(NamedTuple):
    """An arrow: from one role to another (or "logits"), its effect, and the input it acts on."""

    sender: str
    receiver: str
    effect: float
    via: str = ""


@dataclass
class Box:
    """A role with its heads, or the place where an arrow passes; x and y are its centre."""

    row: int
    text: str = ""
    width: float = 0
    height: float = 0  # that of the whole row, once placed
    x: float = 0
    y: float = 0


def circuit_diagram(
    roles: Mapping[str, Sequence[object]],
    edges: Sequence[tuple],
    *,
    levels: Mapping[str, int],
    title: str,
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
    boxes = _boxes({name: heads for name, heads in roles.items() if len(heads)}, levels)
    edges = [edge for edge in edges if edge.sender in boxes and edge.receiver in boxes]
    rows = [[box for box in boxes.values() if box.row == i] for i in range(boxes[END].row + 1)]
    height = _place(rows)
    chains = [_chain(boxes[edge.sender], boxes[edge.receiver], rows) for edge in edges]
    for place in (place for chain in chains for place in chain[1:-1]):
        rows[place.row].append(place)
    _place([sorted(row, key=lambda box: box.x) for row in rows])

    fig = go.Figure()
    _draw_arrows(fig, edges, chains)
    for i, box in enumerate(boxes.values()):
        colour = "#404040" if box is boxes[END] else COLOURS[i % len(COLOURS)]
        across = dict(x0=box.x - box.width / 2, x1=box.x + box.width / 2)
        up = dict(y0=box.y - box.height / 2, y1=box.y + box.height / 2)
        look = dict(line=dict(color=colour, width=1.5), fillcolor=f"{colour}24")
        fig.add_shape(type="rect", label_text=box.text, **across, **up, **look)
    # a pixel is a unit: boxes fit their text, which does not stretch
    fig.update_xaxes(visible=False, range=[0, PNG_WIDTH], fixedrange=True)
    fig.update_yaxes(visible=False, range=[0, height], fixedrange=True)
    size = dict(width=PNG_WIDTH, height=height + 82, margin=dict(l=0, r=0, b=0, t=82))
    return fig.update_layout(title_text=title, **size)


def _check(roles: Mapping, edges: Sequence[Edge], levels: Mapping[str, int]) -> None:
    if END in roles:
        raise ValueError(f"roles: {END!r} is the box at the top, give it no heads")
    if not any(len(heads) for heads in roles.values()):
        raise ValueError("roles: got no role with heads, want at least one")
    if missing := [name for name in roles if name not in levels]:
        raise ValueError(f"levels: got none for {', '.join(missing)}")
    for sender, receiver, *_ in edges:
        arrow = f"edges: {sender!r} to {receiver!r}"
        if sender not in roles or receiver not in (*roles, END):
            raise ValueError(f"{arrow} names no role")
        if receiver != END and levels[receiver] <= levels[sender]:
            got = f"{levels[sender]} to {levels[receiver]}"
            raise ValueError(f"{arrow} must go to a higher level, got {got}")


def _boxes(roles: Mapping[str, Sequence[object]], levels: Mapping[str, int]) -> dict[str, Box]:
    """Boxes from the lowest row to the logits, with text wrapped to fit side by side."""
    boxes = {}
    used = sorted({levels[name] for name in roles})
    for row, level in enumerate(used):
        names = [name for name in roles if levels[name] == level]
        room = int(((PNG_WIDTH - GAP) / len(names) - 2 * GAP) / CHAR)  # letters in a line
        for name in names:
            heads = [str(head) for head in roles[name]]
            fit = min(6, max(1, room // (max(map(len, heads)) + 2)))
            parts = np.array_split(heads, math.ceil(len(heads) / fit))
            lines, header = (
                ["  ".join(part) for part in parts],
                textwrap.wrap(name.replace("_", " "), max(8, room)),
            )
            width = max(110, CHAR * max(map(len, header + lines)) + LINE)
            text = "<br>".join([f"<b>{line}</b>" for line in header] + lines)
            boxes[name] = Box(row, text, width, LINE * (len(header + lines) + 1))
    return boxes | {END: Box(len(used), f"<b>{END}</b>", 110, 2 * LINE)}


def _place(rows: list[list[Box]]) -> float:
    """Set each box's centre and height, spread over the width; returns the height of all rows."""
    y = GAP
    for row in rows:
        height = max(box.height for box in row)
        gap = (PNG_WIDTH - sum(box.width for box in row)) / (len(row) + 1)
        x = 0
        for box in row:
            box.x, box.y, box.height = x + gap + box.width / 2, y + height / 2, height
            x += gap + box.width
        y += height + ROW_GAP
    return y - ROW_GAP + GAP


def _chain(start: Box, end: Box, rows: list[list[Box]]) -> list[Box]:
    """The two boxes and, in each row between, a place on the straight line from one to the other."""
    between = range(start.row + 1, end.row)
    shares = [(rows[i][0].y - start.y) / (end.y - start.y) for i in between]
    return [
        start,
        *(Box(i, x=start.x + s * (end.x - start.x)) for i, s in zip(between, shares, strict=True)),
        end,
    ]


def _ports(chains: list[list[Box]], at: int, towards: int) -> list[float]:
    """x where each arrow touches the box `at` one end: side by side in the order of their next."""
    ports = []
    for i, chain in enumerate(chains):
        box = chain[at]
        mine = [j for j, other in enumerate(chains) if other[at] is box]
        mine.sort(key=lambda j: chains[j][towards].x)
        ports.append(box.x + box.width * ((mine.index(i) + 1) / (len(mine) + 1) - 0.5))
    return ports


def _draw_arrows(fig: go.Figure, edges: Sequence[Edge], chains: list[list[Box]]) -> None:
    largest = max((abs(edge.effect) for edge in edges), default=0) or 1
    labels: list[tuple[float, float]] = []
    starts, ends = _ports(chains, 0, 1), _ports(chains, -1, -2)
    for edge, chain, x0, x1 in zip(edges, chains, starts, ends, strict=True):
        path = [(x0, chain[0].y + chain[0].height / 2)]
        for place in chain[1:-1]:
            path += [(place.x, place.y - place.height / 2), (place.x, place.y + place.height / 2)]
        path.append((x1, chain[-1].y - chain[-1].height / 2))
        colour = RAISES if edge.effect > 0 else LOWERS
        width = 1 + 5 * abs(edge.effect) / largest
        for n, ((ax, ay), (x, y)) in enumerate(pairwise(path), start=2):
            head = dict(arrowhead=2 if n == len(path) else 0, arrowsize=max(0.5, 1.6 / width**0.5))
            look = dict(arrowcolor=colour, arrowwidth=width, axref="x", ayref="y", text="")
            fig.add_annotation(x=x, y=y, ax=ax, ay=ay, showarrow=True, **look, **head)
        (x, y), (nx, ny) = path[:2]
        spots = [(x + t * (nx - x), y + t * (ny - y)) for t in (0.45, 0.7, 0.22)]
        free = (
            s
            for s in spots
            if all(abs(s[0] - x) > LABEL[0] or abs(s[1] - y) > LABEL[1] for x, y in labels)
        )
        labels.append(next(free, spots[0]))
    for edge, (x, y) in zip(edges, labels, strict=True):  # over all arrows
        text = f"{edge.via} {edge.effect:+.2f}".strip().replace("-", "−")
        fig.add_annotation(
            x=x, y=y, text=text, showarrow=False, bgcolor="white", font_size=12, borderpad=1
        )
