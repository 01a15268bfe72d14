"""The two circuits as drawings, light and dark: SVG files for READMEs and notebooks.

Columns are the positions of a prompt, bottom to top are the layers, and an arrow is a step: heads
that carry something from one position to another. A colour is a family of roles, the same as in
`utils.diagram`.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import NamedTuple

from utils.diagram import FAMILIES
from utils.ledger.results import write_file
from utils.session import ROOT

WIDTH, ROW, LINE = 640, 56, 26  # pixels: the drawing, a step, a line of the key
LIGHT = dict(page="#ffffff", ink="#1f2328", faint="#656d76", box="#f0f2f5")
DARK = dict(page="#0d1117", ink="#e6edf3", faint="#9198a1", box="#21262d")
ON_DARK = {  # the colour of a family on a dark page
    "before": "#e3b341",
    "again": "#4fc3d0",
    "inhibition": "#c792ea",
    "for": "#8bc34a",
}


class Step(NamedTuple):
    """Heads of one family carry something from one position to another; `text` is for the key."""

    family: str
    start: int
    end: int
    text: str


class Circuit(NamedTuple):
    """Words and the names of their places, steps from early to late, the answer over the last."""

    title: str
    words: Sequence[tuple[str, str]]
    steps: Sequence[Step]
    answer: str


CIRCUITS = {
    "project-1-induction-heads/figures/two_heads": Circuit(
        "How two heads continue a pattern",
        [("Dumb", "A"), ("ledore", "B"), ("…", ""), ("Dumb", "A again")],
        [
            Step("before", 0, 1, "previous-token head: writes at B that A came before"),
            Step("again", 1, 3, "induction head: looks for what came after A, copies it"),
        ],
        "ledore",
    ),
    "project-2-Indirect-Object-Identification/figures/task": Circuit(
        "How GPT-2 small tells who is given the drink (Wang et al. 2022)",
        [("Mary", "IO"), ("John", "S1"), ("went", "S1+1"), ("… John", "S2"), ("… to", "END")],
        [
            Step("before", 1, 2, "previous-token heads: “John came before me”"),
            Step("again", 1, 3, "duplicate-token heads: “John was here before”"),
            Step("again", 2, 3, "induction heads: the same, by what came after"),
            Step("inhibition", 3, 4, "S-inhibition heads: “do not look at John”"),
            Step("for", 0, 4, "name movers: look at the other name, copy it"),
        ],
        "Mary",
    ),
}


def svg(circuit: Circuit, dark: bool = False) -> str:
    """The drawing as an SVG document, which names what it shows for those who cannot see it."""
    look = DARK if dark else LIGHT
    colours = {name: ON_DARK[name] if dark else FAMILIES[name].colour for name in ON_DARK}
    n, floor = len(circuit.steps), 100 + ROW * len(circuit.steps)  # top of the words
    widest = max(_width(circuit.words[-1][0]), _width(circuit.answer))
    gap = (WIDTH - 84 - widest / 2) / (len(circuit.words) - 1)  # the last word and a margin fit
    columns = [76 + gap * i for i in range(len(circuit.words))]
    height = floor + 92 + LINE * n
    parts = [f'<rect width="{WIDTH}" height="{height}" fill="{look["page"]}"/>']

    for x, (word, place) in zip(columns, circuit.words, strict=True):
        parts += [] if word == "…" else [_line(x, floor, x, 76, look["faint"], 1.5, "2 5")]
        parts += [_word(x, floor, word, look), _text(x, floor + 60, place, look["faint"], 18)]
    end = columns[-1]
    parts += [_line(end, floor, end, 60, look["ink"], 2), _head(end, 50, look["ink"], up=True)]
    parts.append(_word(end, 8, circuit.answer, look))
    parts.append(
        f'<text transform="translate(22 {floor - 6}) rotate(-90)" font-size="18" '
        f'fill="{look["faint"]}">layers →</text>'
    )
    for i, step in enumerate(circuit.steps):
        x0, x1, y = columns[step.start], columns[step.end], floor - 40 - ROW * i
        colour = colours[step.family]
        parts += [_line(x0, y, x1 - 12, y, colour, 4), _head(x1 - 2, y, colour)]
        parts += [f'<circle cx="{x0}" cy="{y}" r="6" fill="{colour}"/>']
        parts += _disc((x0 + x1) / 2, y, i + 1, colour, look)
        parts += _disc(24, floor + 92 + LINE * i, i + 1, colour, look)
        parts.append(_text(46, floor + 98 + LINE * i, step.text, look["ink"], 19, "start"))

    said = ". ".join(f"{i}: {step.text}" for i, step in enumerate(circuit.steps, start=1))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
    head += f'width="{WIDTH}" height="{height}" font-family="Helvetica, Arial, sans-serif">'
    words = f"<title>{escape(circuit.title)}</title>", f"<desc>{escape(said)}.</desc>"
    return "\n".join([head, *words, *parts, "</svg>\n"])


def write_drawings() -> list[Path]:
    """Write every drawing, and its dark variant beside it; returns the files."""
    written = []
    for name, circuit in CIRCUITS.items():
        for dark in (False, True):
            path = ROOT / f"{name}{'_dark' if dark else ''}.svg"
            write_file(path, svg(circuit, dark))
            written.append(path)
    return written


def _line(x0: float, y0: float, x1: float, y1: float, colour: str, width: float, dash="") -> str:
    ends = f'x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"'
    dash = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<line {ends} stroke="{colour}" stroke-width="{width}"{dash}/>'


def _head(x: float, y: float, colour: str, up: bool = False) -> str:
    """An arrow's head, with its tip at (x, y)."""
    ends = [(-8, 14), (8, 14)] if up else [(-14, -8), (-14, 8)]
    corners = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in [(0, 0), *ends])
    return f'<polygon points="{corners}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, colour: str, size: int, anchor: str = "middle") -> str:
    place = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}"'
    return f'<text {place} font-size="{size}" fill="{colour}">{escape(text)}</text>'


def _word(x: float, top: float, word: str, look: dict[str, str]) -> str:
    if word == "…":
        return _text(x, top + 26, word, look["faint"], 22)
    width = _width(word)
    box = f'<rect x="{x - width / 2:g}" y="{top}" width="{width}" height="38" rx="6" '
    return f'{box}fill="{look["box"]}"/>' + _text(x, top + 26, word, look["ink"], 20)


def _width(word: str) -> int:
    return 24 + 12 * len(word)


def _disc(x: float, y: float, number: int, colour: str, look: dict[str, str]) -> list[str]:
    disc = f'<circle cx="{x:g}" cy="{y:g}" r="12" fill="{colour}"/>'
    return [disc, _text(x, y + 6, str(number), look["page"], 17)]
