"""The look of figures: colours, the template, how they are shown, where titles and labels stand."""

import html
import itertools
import os
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import plotly.graph_objects as go
import plotly.io as pio

# After Okabe and Ito, who keep colours apart for colour-blind readers; darker where theirs have
# less than 3:1 on white. Lines also differ by dash, bars by hatching.
COLOURS = ["#0072B2", "#D55E00", "#008A64", "#B8508C", "#A06600", "#2A78AF", "#6B5900", "#404040"]
DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"]
MAPS = "Blues"  # what is 0 or more, such as attention
HATCHES = ["", "/", ".", "x"]
MARK = dict(color="#444", dash="dash", width=1)
AXIS = dict(gridcolor="#e6e6e6", linecolor="#888", ticks="outside", automargin=True)
AXIS |= dict(zeroline=False, title_standoff=8, title_font_size=13)
# A template of our own is a few hundred bytes; plotly's default adds 7 KB to every stored figure.
pio.templates["replication"] = go.layout.Template(
    layout=dict(
        font=dict(family="Helvetica, Arial, sans-serif", size=13, color="#222"),
        title=dict(x=0.02, xanchor="left", font_size=17, subtitle_font=dict(size=12, color="#666")),
        colorway=COLOURS,
        margin=dict(l=70, r=30, t=82, b=60),
        legend=dict(orientation="h", yref="container", y=0.01, yanchor="bottom", x=0),
        xaxis=AXIS,
        yaxis=AXIS,
        coloraxis_colorbar=dict(thickness=14, tickformat="~g"),
        bargap=0.3,
        hoverlabel_namelength=-1,
    ),
    data=dict(heatmap=[dict(xgap=0.5, ygap=0.5)]),
)
pio.templates.default = "replication"


class Offline(type(pio.renderers["notebook"])):
    """A figure with plotly's script, and without the one for formulas, which a CDN would send."""

    def to_mimebundle(self, fig_dict: dict) -> dict[str, str]:
        page = super().to_mimebundle(fig_dict)["text/html"]
        return {"text/html": re.sub(r'<script src="http[^"]*mathjax[^>]*></script>', "", page)}


pio.renderers["notebook"] = Offline(config={"responsive": True})
chosen = pio.renderers.default
if chosen == "plotly_mimetype" and "PLOTLY_RENDERER" not in os.environ:
    # That shows nothing where JupyterLab lives in another environment and lacks plotly's extension;
    # the second form carries its own script. Colab, VS Code and a chosen renderer are left alone.
    chosen = "plotly_mimetype+notebook"
pio.renderers.default = chosen  # plotly had made its own before
PNG_WIDTH = 900  # figures stretch to the page; only the picture stored beside them has a width
pio.renderers["png"].width, pio.renderers["png"].scale = PNG_WIDTH, 2
TITLE_WIDTH, NOTE_WIDTH = 72, 96  # letters in a line; pages break lines anew on a narrow screen
FEW = 16  # measured points up to this number are marked


def titled(fig: go.Figure, title: str, note: str, headings: int = 12, *, height: int) -> go.Figure:
    """Title and the line under it, with the room that they take; y titles wrapped to their axis.

    `headings` is the room in pixels of what stands between them and the plot. Raises TypeError for
    a title that is no text.
    """
    if not isinstance(title, str):
        raise TypeError(f"title must be text; got {title!r}")
    plot = height - 142  # without the margins of the template
    for axis in fig.select_yaxes():
        low, high = axis.domain or (0, 1)
        if axis.title.text:  # of letters 8 pixels wide
            axis.title.text = wrapped(axis.title.text, max(10, int(plot * (high - low) / 8)))
    text, note = wrapped(title, TITLE_WIDTH), wrapped(note, NOTE_WIDTH)
    lines = note.count("<br>") + 1 if note else 0
    room = 54 + headings + 22 * text.count("<br>") + 18 * lines
    place = dict(yref="container", y=1, yanchor="top", pad_t=24)
    fig.update_layout(title=dict(text=text, subtitle_text=note, **place))
    return fig.update_layout(margin_t=room, height=height + room - 82)


def wrapped(text: str, width: int) -> str:
    """The text in lines of at most `width` letters, as plotly breaks them."""
    return "<br>".join(map(escaped, textwrap.wrap(text, width)))


def escaped(text: object) -> str:
    """Text for plotly, which would read tags in it, entities (`&lt;` as `<`) and line breaks."""
    return html.escape(str(text), quote=False).replace("\n", "\\n")


LAYERS_FROM = 3  # the first of COLOURS for layers; those before are for lines that are no heads


def line_looks(names: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and dash of each line, the same in every figure with such names.

    Heads of a layer share a colour and differ by dash, if there are dashes enough. Of names in two
    parts ("zero, induction", "mean, control") the colour tells the first part, the dash the second.
    """
    pairs = {name: tuple(name.split(", ")) for name in names}
    if {*map(len, pairs.values())} == {2}:
        kinds, groups = (list(dict.fromkeys(x)) for x in zip(*pairs.values(), strict=True))
        if len(kinds) <= len(COLOURS) and len(groups) <= len(DASHES):
            at = {n: (kinds.index(kind), groups.index(group)) for n, (kind, group) in pairs.items()}
            return {name: (COLOURS[i], DASHES[j]) for name, (i, j) in at.items()}
    layers = by_layer(names)
    if not layers:
        turns = [divmod(i, len(COLOURS)) for i in range(len(names))]
        looks = [(COLOURS[i], DASHES[(i + turn) % len(DASHES)]) for turn, i in turns]
        return dict(zip(names, looks, strict=True))
    others, looks = [n for n in names if n not in itertools.chain(*layers.values())], {}
    for i, name in enumerate(others):
        looks[name] = COLOURS[i % len(COLOURS)], DASHES[i % len(DASHES)]
    for i, of_layer in enumerate(layers.values(), start=max(len(others), LAYERS_FROM)):
        for dash, name in zip(DASHES, of_layer, strict=False):
            looks[name] = COLOURS[i % len(COLOURS)], dash
    return looks


def by_layer(names: Iterable[str]) -> dict[str, list[str]]:
    """The heads among the names, by layer; none where a layer has more than there are dashes."""
    layers = {}
    for name in names:
        if match := re.fullmatch(r"L(\d+)H\d+", name):
            layers.setdefault(match[1], []).append(name)
    return layers if max(map(len, layers.values()), default=0) <= len(DASHES) else {}


def end_labels(ends: Mapping[str, float], span: float) -> list[tuple[float, str]]:
    """Names for the ends of lines, (y, text): one for those of a layer that end together.

    Ends within a tenth of `span` are together: their labels would meet.
    """
    labels = []  # (ys, layer, heads)
    for name, y in sorted(ends.items(), key=lambda end: end[1]):
        layer, head = name.split("H")
        near = [label for label in labels if label[1] == layer and y - label[0][0] < span / 10]
        if near:
            near[0][0].append(y)
            near[0][2].append(int(head))
        else:
            labels.append(([y], layer, [int(head)]))
    shown = []
    for ys, layer, heads in labels:
        low, high, n = min(heads), max(heads), len(heads)
        run = f"{low}–{high}" if n == high - low + 1 > 2 else ",".join(map(str, sorted(heads)))
        shown.append([sum(ys) / n, f"{layer}H{run}"])
    for below, above in itertools.pairwise(shown):  # of other layers: one above the other
        above[0] = max(above[0], below[0] + span / 10)
    return [tuple(label) for label in shown]


def role_in_words(role: str) -> str:
    """A role as people write it: "previous_token" is previous token."""
    return {"s_inhibition": "S-inhibition", "s_reader": "S reader"}.get(
        role, role.replace("_", " ")
    )


def category(name: object, n: int) -> str:
    """A bar's name: no underscores, and wrapped where the bars have room for it."""
    text = role_in_words(str(name))
    return wrapped(text, 14) if n <= 7 else escaped(text)


SIDES = {  # where a label may stand: steps to its middle, in widths and heights of the label
    "top center": (0, 1),
    "bottom center": (0, -1),
    "middle right": (0.6, 0),
    "middle left": (-0.6, 0),
    "top right": (0.6, 1),
    "bottom left": (-0.6, -1),
    "top left": (-0.6, 1),
    "bottom right": (0.6, -1),
}


def beside(x: np.ndarray, y: np.ndarray, labels: dict[int, str]) -> tuple[list[str], list[str]]:
    """The text and its side for each point: no label meets another, on a wide page or on a phone.

    `labels` (by point) are placed in turn, off other points where they can; what finds no free side
    is left to hovering. Axes reach to zero.
    """
    shown, sides = [""] * len(x), ["top center"] * len(x)
    taken = []  # (middle on a wide page, middle on a phone, width)
    ends = [(min(values.min(), 0), max(values.max(), 0)) for values in (x, y)]
    shares = [(v - low) / (high - low or 1) for v, (low, high) in zip((x, y), ends, strict=True)]
    for i, label in labels.items():
        width, free = 8 * len(label) + 6, {}
        for side, (right, up) in SIDES.items():
            middles = [
                (shares[0][i] * page + right * width, shares[1][i] * 260 + up * 15)
                for page in (700, 200)
            ]
            if all(
                abs(a[0] - b[0]) > (width + wide) / 2 or abs(a[1] - b[1]) >= 15
                for *others, wide in taken
                for a, b in zip(middles, others, strict=True)
            ):
                across, down = middles[0]
                near = abs(shares[0] * 700 - across) < width / 2 + 4
                covered = near & (abs(shares[1] * 260 - down) < 10)
                free[side] = middles, covered.sum()
        if free:
            sides[i] = min(free, key=lambda side: free[side][1])
            shown[i] = label
            taken.append((*free[sides[i]][0], width))
    return shown, sides


def framed(view: str, names: Sequence[str]) -> str:
    """A circuitsvis view, which is about as high as wide: on white, and to be seen at once.

    Its pictures of heads shrink on a wide page, and their names would then cover them.
    """
    box = "max-width:380px; padding:4px; background:white; color:#222"
    rules = {
        "h2, h3": "font-size:14px !important; margin:4px 0 !important",
        "h2, h4": "background:white !important; color:#222 !important",
        "h4": "position:static !important; order:2; font-size:13px; text-align:center",
        "div:has(> h4)": "display:flex; flex-direction:column",
        "h4 + div": "flex:none !important",
        "div:has(> div > div > h4)": "flex:0 0 90px !important; max-width:90px !important",
    }
    style = "\n".join(f".attention-view :is({of}) {{ {look} }}" for of, look in rules.items())
    label = html.escape(f"Attention of {', '.join(names)}")
    said = f'class="attention-view" role="img" aria-label="{label}"'
    return f'<div {said} style="{box}"><style>{style}</style>{view}</div>'
