"""Figures of a text of your own (`utils.widgets.own_text`), before and after heads are taken out.

Whatever was typed is escaped: plotly reads some HTML in its labels.
"""

from collections.abc import Sequence, Set

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from utils.diagram import LOWERS, RAISES
from utils.heads import Head
from utils.look import COLOURS, MAPS, escaped, titled
from utils.widgets.own_text import EndRun, TextRun

ATTENTION = dict(zmin=0, zmax=1, colorscale=MAPS, showscale=False)
ATTENTION |= dict(hovertemplate="%{y} to %{x}: %{z:.2f}<extra></extra>")


def text_figure(
    words: Sequence[str],
    heads: Sequence[Head],
    before: TextRun,
    after: TextRun,
    off: Set[Head],
    position: int,
) -> go.Figure:
    """Loss by token, with all heads and without those `off`, over attention from one token."""
    at = list(range(len(words)))
    labels = [f"{head} off" if head in off else str(head) for head in heads]
    titles = [
        "loss of each token (nats)",
        f"attention from {escaped(words[position].strip())} (token {position})",
    ]
    look = dict(shared_xaxes=True, vertical_spacing=0.16, subplot_titles=titles)
    figure = make_subplots(2, 1, row_heights=[200, 20 + 18 * len(heads)], **look)
    shown = [("all heads", before, "")] + [("some off", after, "/")] * bool(off)
    for (name, run, shape), colour in zip(shown, COLOURS, strict=False):
        hatch = dict(shape=shape, fillmode="overlay", fgcolor="white", solidity=0.2)
        look = dict(name=name, marker_color=colour, marker_pattern=hatch, showlegend=bool(off))
        figure.add_bar(x=at[1:], y=run.losses.numpy(), **look, row=1, col=1)
    z = after.attention[:, position].numpy()
    figure.add_heatmap(z=z, x=at, y=labels, **ATTENTION, row=2, col=1)
    ticks = dict(tickvals=at, ticktext=[escaped(word) for word in words], tickangle=-60)
    figure.update_xaxes(**ticks, showticklabels=True)
    figure.update_yaxes(autorange="reversed", dtick=1, row=2)
    note = f"mean loss {before.losses.mean():.2f} nats"
    if off:
        note += f"; without {', '.join(map(str, sorted(off)))}: {after.losses.mean():.2f}"
    return titled(figure, "Your text under the model", note, 34, height=480 + 18 * len(heads))


def end_figure(
    words: Sequence[str],
    names: tuple[str, str],
    heads: Sequence[Head],
    before: EndRun,
    after: EndRun,
    out: Set[Head],
    likeliest: str,
) -> go.Figure:
    """Attention from END of each head, and what it writes: red for IO, blue against it."""
    at = list(range(len(words)))
    rows = [f"{head} out" if head in out else str(head) for head in heads]
    titles = ["attention<br>from END", "writes to the<br>logit difference"]  # apart on a phone
    look = dict(shared_yaxes=True, horizontal_spacing=0.03, column_widths=[0.6, 0.4])
    figure = make_subplots(1, 2, subplot_titles=titles, **look)
    figure.add_heatmap(z=after.attention.numpy(), x=at, y=rows, **ATTENTION, row=1, col=1)
    lit = [RAISES if written > 0 else LOWERS for written in after.written]
    for name, run, colour in (("now", after, lit), ("with all heads", before, "#a0a0a0")):
        bar = dict(orientation="h", name=name, marker_color=colour, showlegend=False)
        figure.add_bar(x=run.written.numpy(), y=rows, **bar, row=1, col=2)
    ticks = dict(tickvals=at, ticktext=[escaped(word) for word in words], tickangle=-60)
    figure.update_xaxes(**ticks, row=1, col=1)
    figure.update_xaxes(title="logits", zeroline=True, zerolinecolor="#888", row=1, col=2)
    figure.update_yaxes(autorange="reversed", dtick=1)
    figure.update_yaxes(ticks="", row=1, col=2)
    figure.update_layout(margin_b=90)  # the words hang down
    wins = escaped(names[after.logit_diff < 0].strip())
    shares = zip(names, after.probabilities, strict=True)
    note = ", ".join(f"{escaped(name.strip())} {share:.1%}" for name, share in shares)
    note += f"; likeliest: {escaped(likeliest.strip())}; with all heads "
    note += f"{before.logit_diff:+.2f} (grey bars)"
    title = f"{wins} wins: logit difference {after.logit_diff:+.2f}"
    return titled(figure, title, note, 48, height=240 + 20 * len(heads))
