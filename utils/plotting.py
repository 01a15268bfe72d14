"""Figures with one look: plotly heat maps, lines, bars, scatters; circuitsvis attention.

Every function takes torch tensors (or lists) and returns a plotly Figure: leave it as the last
expression of a cell, or call `.show()`. (`attention` shows its view by itself.)

    plotting.head_heatmap({"queries": q, "keys": k}, title="Patching effect", diverging=True)
    plotting.lines(positions, {"loss": loss}, title="...", x_label="token", y_label="loss (nats)")
    plotting.bars(["none", "zero", "mean"], losses, title="...", y_label="loss (nats)")
    plotting.scatter(stripe, prefix, title="...", x_label="...", y_label="...", label_top=5)
    plotting.lines(run.steps, {"L0H1": a, "L1H2": b}, title="...", x_label="step", y_label="...")
    plotting.attention(model.to_str_tokens(text), patterns, names=["L5H5", "L6H9"])

A series of lines or bars is y, or (y, stderr), or samples [prompt x]: these are drawn as their mean
over prompts with its standard error. Series named like heads are coloured by layer.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from numbers import Real

import numpy as np
import plotly.express as px
import plotly.graph_objects as go
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from utils.look import (
    FEW,
    HATCHES,
    MAPS,
    MARK,
    PNG_WIDTH,
    beside,
    by_layer,
    category,
    end_labels,
    escaped,
    framed,
    line_looks,
    titled,
    wrapped,
)
from utils.typed import BadArgument, kind_of

Numbers = Tensor | np.ndarray | Sequence[float]
Series = Mapping[str, Numbers | tuple[Numbers, Numbers]]
Mark = tuple[float, str] | None
Names = Sequence[str | float]
Map = Float[Tensor, "row col"]
DICT = "a dict, name to values"
LISTS = Sequence | np.ndarray | Tensor
MANY_ROWS = 20


def heatmap(
    values: Map | Mapping[str, Map],
    *,
    title: str,
    x: Names | None = None,
    y: Names | None = None,
    x_label: str = "",
    y_label: str = "",
    value_label: str = "value",
    diverging: bool = False,
    limit: float | None = None,
    note: str = "",
) -> go.Figure:
    """Heat map, or several of one shape side by side (dict of name to values) on one colour scale.

    `x` and `y` label the columns and rows; row 0 is at the top. The scale runs over -limit..limit
    (red above zero, blue below) when `diverging`, else from zero (or the smallest value, if
    negative) to limit; the default limit is the largest found. Maps of up to 40 cells also print
    their values. The line under the title says what the colour is, and `note` goes on after it.
    Raises ValueError for values that are not 2-d, empty, of unequal shapes, or labels that miss a
    row or column.
    """
    x_label, y_label, value_label = map(escaped, (x_label, y_label, value_label))
    maps = _maps(values)
    shapes = [a.shape for a in maps.values()]
    if len(set(shapes)) != 1:
        raise ValueError(f"values: want maps of one shape, got {shapes}")
    stack = np.stack(list(maps.values())).astype(np.float32)  # [map row col]
    n_maps, n_rows, n_cols = stack.shape
    _check_length("x", x, n_cols, "columns")
    _check_length("y", y, n_rows, "rows")
    if limit is not None and not (isinstance(limit, Real) and 0 < limit < math.inf):
        raise BadArgument(f"limit must be a number above 0; got {kind_of(limit)}")
    finite = stack[np.isfinite(stack)]
    high = limit or float((abs(finite) if diverging else finite).max(initial=0)) or 1.0
    scale = dict(zmin=-high if diverging else float(finite.min(initial=0)), zmax=high)
    colours = "RdBu_r" if diverging else MAPS
    look = dict(color_continuous_scale=colours, aspect="auto", facet_col_spacing=0.04, **scale)
    fig = px.imshow(stack, facet_col=0, labels=dict(x=x_label, y=y_label, color=""), **look)
    place = f"{y_label or 'row'}: %{{y}}<br>{x_label or 'column'}: %{{x}}"
    fig.update_traces(texttemplate="%{z:.2f}" if n_rows * n_cols <= 40 else None)
    fig.update_traces(hovertemplate=f"{place}<br>{value_label}: %{{z:.3f}}<extra></extra>")
    for heading, name in zip(fig.layout.annotations, maps, strict=True):
        heading.update(text=wrapped(name, 40 // n_maps), font_size=13)
    fig.update_xaxes(
        showgrid=False, **_ticks(x, n_cols, PNG_WIDTH // ((22 if x is not None else 60) * n_maps))
    )
    fig.update_yaxes(showgrid=False, **_ticks(y, n_rows, 40))
    fig.update_yaxes(ticks="", selector=dict(showticklabels=False))
    colour = f"red above 0, blue below, full at ±{high:.2g}" if diverging else "darker is more"
    note = "; ".join(map(str, filter(None, [f"{value_label}: {colour}", note])))
    headings = 34 if n_maps > 1 else 12
    if y is None and n_rows > MANY_ROWS:  # layers: low rows, of which every fifth has a number
        fig.update_yaxes(dtick=5, nticks=None)
        _narrow(fig, n_maps * n_cols)
        return titled(fig, title, note, headings, height=min(720, 12 * n_rows + 142))
    return titled(fig, title, note, headings, height=min(720, max(320, 17 * n_rows + 190)))


def _narrow(fig: go.Figure, n_cols: int) -> None:
    """Leave room at the right of few columns: cells four times as wide as high can be compared."""
    share = min(1, max(0.6, 48 * n_cols / (PNG_WIDTH - 160)))
    for axis in fig.select_xaxes():
        axis.domain = [share * end for end in axis.domain]
    for heading in fig.layout.annotations:
        heading.x *= share
    fig.update_layout(coloraxis_colorbar_x=share + 0.02)


def head_heatmap(
    values: Map | Mapping[str, Map], *, value_label="score", head_label="head", **options
) -> go.Figure:
    """Heat map [layer head], or several side by side; `options` are those of `heatmap`.

    Maps too large to print their values name their three largest cells (one each, if several).
    """
    labels = dict(x_label=head_label, y_label="layer", value_label=value_label)
    maps = _maps(values)
    n = 3 if len(maps) == 1 else 1
    large = {name: _largest(a, n, head_label) for name, a in maps.items() if a.size > 40}
    named = [f"{name} {cells}".strip() for name, cells in large.items()]
    note = f"largest: {', '.join(named)}" if named else ""
    return heatmap(maps, note=note, **labels, **options)


def lines(x: Numbers, series: Series, *, y_label: str, **options) -> go.Figure:
    """Lines over one x axis, shaded by one standard error where it is known.

    `options` (title, x_label, marker, log_x, log_y) and errors are those of `panels`.
    """
    return panels(x, {y_label: series}, **options)


def panels(
    x: Numbers,
    by_label: Mapping[str, Series],
    *,
    title: str,
    x_label: str,
    marker: Mark = None,
    window: tuple[float, float] | None = None,
    log_x: bool = False,
    log_y: bool = False,
) -> go.Figure:
    """Line plots stacked over one x axis: dict of y label to series, each panel with its legend.

    A name has the same colour in every panel; heads ("L0H1") have that of their layer, which stands
    in the legend, and their names where their lines end. `marker` = (x, text) draws a vertical
    dashed line, `window` = (from, to) shades a stretch of x. Raises ValueError for no series, or
    one that does not have a value for each x.
    """
    x = _array(x, "x", 1)
    _check_kind("by_label", by_label, Mapping, DICT)
    for series in by_label.values():
        _check_kind("series", series, Mapping, DICT)
    if not by_label or not all(by_label.values()):
        raise ValueError("series: got none, want at least one in each panel")
    drawn = {escaped(label): {escaped(n): y for n, y in s.items()} for label, s in by_label.items()}
    x_label = escaped(x_label)
    names = list(dict.fromkeys(name for series in drawn.values() for name in series))
    looks = line_looks(names)
    first = next(iter(drawn.values()))
    alike = all(list(series) == list(first) for series in drawn.values())  # one legend is enough
    gap = 0.06 if alike and len(drawn) > 2 else 0.13
    fig = make_subplots(rows=len(drawn), shared_xaxes=True, vertical_spacing=gap)
    for row, (label, series) in enumerate(drawn.items(), start=1):
        if len(drawn) > 1:  # each legend above its own panel
            top = fig.get_subplot(row, 1).yaxis.domain[1]
            above = dict(orientation="h", yref="paper", y=top, yanchor="bottom", x=0)
            fig.update_layout({f"legend{row}": above})
        fig.update_layout(showlegend=len(names) > 1)
        fig.update_yaxes(title=label, row=row)
        _draw_series(fig, row, x, series, looks, f"{x_label}: %{{x}}<br>{label}: %{{y:.3f}}")
        if row > 1 and alike:
            fig.update_traces(showlegend=False, row=row, col=1)
    notes = ["shaded: ± one standard error"] if any(trace.fill for trace in fig.data) else []
    fig.update_xaxes(title=x_label, row=len(drawn))
    if log_x:
        if x.min() <= 0:
            raise ValueError(f"x: a logarithmic axis wants numbers above 0, got {x.min():g}")
        low, high = math.log10(x.min()), math.log10(x.max())
        edge = 0.05 * (high - low) or 1
        fig.update_xaxes(type="log", range=[low - edge, high + edge])
        fig.update_xaxes(tickvals=x.tolist(), ticktext=[f"{value:g}" for value in x])
    if log_y:
        fig.update_yaxes(type="log", dtick=math.log10(2), tickformat=".3~r")  # at doublings
    _check_pair("window", window, Real)
    _check_pair("marker", marker, str)
    if window is not None:
        fig.add_vrect(*window, fillcolor="#888", opacity=0.15, line_width=0, row="all", col=1)
    if marker is not None:
        at, text = marker
        fig.add_vline(at, line=MARK, row="all", col=1)
        if len(drawn) == 1:
            drawn_at = np.log10 if log_x else np.asarray  # as plotly places a note on a log axis
            at, low, high = (float(drawn_at(value)) for value in (at, x.min(), x.max()))
            side = "left" if at < (low + high) / 2 else "right"
            place = dict(y=1, yref="y domain", yanchor="bottom", xanchor=side)
            fig.add_annotation(x=at, text=escaped(text), showarrow=False, **place)
        else:  # a legend stands there
            notes = [f"dashed: {text}", *notes]
    height, room = (440, 24) if len(drawn) == 1 else (150 + 210 * len(drawn), 50)
    return titled(fig, title, "; ".join(notes), room, height=height)


def _draw_series(
    fig: go.Figure, row: int, x: np.ndarray, series: Series, looks: Mapping, hover: str
) -> None:
    """Draw the lines of one panel, each with a band of one standard error where that is known.

    Where a layer has several heads, the legend names the layer in their place.
    """
    panel, ends = dict(row=row, col=1), {}
    firsts = {n: of[0] for of in by_layer(series).values() if len(of) > 1 for n in of}
    for name, values in series.items():
        y, stderr = _with_error(values, name, len(x))
        colour, dash = looks[name]
        if name in firsts and np.isfinite(y[-1]):
            ends[name] = y[-1]
        if firsts.get(name) == name:
            layer = dict(name=name.split("H")[0].replace("L", "layer "), legend=f"legend{row}")
            layer |= dict(x=[None], y=[None], mode="lines", line_color=colour, hoverinfo="skip")
            fig.add_scatter(**layer, **panel)
        if stderr is not None:
            known = np.isfinite(y)  # the outline of a shape must have no gaps
            at, low, high = x[known], (y - stderr)[known], (y + stderr)[known]
            band = dict(x=[*at, *at[::-1]], y=[*high, *low[::-1]], mode="none", fill="toself")
            band |= dict(fillcolor=f"{colour}33", hoverinfo="skip", showlegend=False)
            fig.add_scatter(**band, **panel)
        line = dict(x=x, y=y, name=name, line=dict(width=2, color=colour, dash=dash))
        line |= dict(mode="lines+markers" if len(x) <= FEW else "lines", legend=f"legend{row}")
        line |= dict(hovertemplate=f"{hover}<extra>{name}</extra>", showlegend=name not in firsts)
        fig.add_scatter(**line, **panel)
    if ends:
        _name_ends(fig, ends, {name: looks[name][0] for name in ends}, row)


def _name_ends(
    fig: go.Figure, ends: Mapping[str, float], colours: Mapping[str, str], row: int
) -> None:
    """Names of heads at the right of the panel, where their lines end."""
    drawn = [y for trace in fig.select_traces(row=row, col=1) for y in trace.y if y is not None]
    for y, text in end_labels(ends, float(np.nanmax(drawn) - np.nanmin(drawn)) or 1.0):
        colour = next(c for name, c in colours.items() if name.split("H")[0] == text.split("H")[0])
        look = dict(showarrow=False, xanchor="left", font=dict(size=11, color=colour))
        place = dict(x=1, xref="x domain", y=y, xshift=4)
        fig.add_annotation(text=text, **place, **look, row=row, col=1)
    fig.update_layout(margin_r=70)


def bars(
    names: Names,
    values: Numbers | Series,
    errors: Numbers | None = None,
    *,
    title: str,
    y_label: str,
    x_label: str = "",
    baseline: Mark = None,
) -> go.Figure:
    """Bars with error bars where the standard error is known; a dict of series is drawn in groups.

    `baseline` = (y, text) draws a horizontal dashed line. Raises ValueError for lengths that differ
    from `names`.
    """
    if not isinstance(values, Mapping):
        values = {"": values if errors is None else (values, errors)}
    elif errors is not None:
        raise ValueError("errors: with a dict of series, give each series as (values, stderr)")
    _check_kind("names", names, LISTS, "a list")
    fig, note, names = go.Figure(), "", [category(name, len(names)) for name in names]
    x_label, y_label = escaped(x_label), escaped(y_label)
    values = {escaped(name): series for name, series in values.items()}
    for i, (name, series) in enumerate(values.items()):
        y, stderr = _with_error(series, name or "values", len(names))
        hover = f"%{{x}}<br>{y_label}: %{{y:.3f}}<extra>{name}</extra>"
        errors = dict(array=stderr, thickness=1.5, color="#333")
        shape = HATCHES[i % len(HATCHES)]
        hatch = dict(shape=shape, fillmode="overlay", fgcolor="white", solidity=0.2)
        look = dict(error_y=errors, marker_pattern=hatch, hovertemplate=hover)
        fig.add_bar(x=names, y=y, name=name, **look)
        note = note if stderr is None else "error bars: ± one standard error"
    _check_pair("baseline", baseline, str)
    if baseline is not None:
        fig.add_hline(
            baseline[0], line=MARK, annotation=dict(text=escaped(baseline[1]), xanchor="right")
        )
    fig.update_xaxes(title=x_label, type="category")
    fig.update_yaxes(title=y_label, zeroline=True, zerolinecolor="#888")
    return titled(fig, title, note, height=440)


def scatter(
    x: Numbers,
    y: Numbers,
    *,
    title: str,
    x_label: str,
    y_label: str,
    names: Names | None = None,
    diagonal: bool = False,
    label_top: int = 0,
) -> go.Figure:
    """Scatter of x against y; `names` show on hover, and beside the `label_top` farthest points.

    Scores [layer head] need no names: their points are heads. `diagonal` draws y = x. Raises
    ValueError for shapes that differ.
    """
    x, y = _array(x, "x", 1, 2), _array(y, "y", 1, 2)
    if x.shape != y.shape:
        raise ValueError(f"y: got shape {list(y.shape)}, want that of x, {list(x.shape)}")
    _check_length("names", names, x.size, "points")
    if not isinstance(label_top, int) or label_top < 0:
        raise BadArgument(f"label_top must be a count; got {kind_of(label_top)}")
    if names is None and x.ndim == 2:
        names = [f"L{layer}H{head}" for layer, head in np.ndindex(x.shape)]
    names = [""] * x.size if names is None else list(map(escaped, names))
    x_label, y_label = escaped(x_label), escaped(y_label)
    x, y = x.ravel(), y.ravel()
    # Far from the middle in either axis, each measured in its own spread.
    far = sum(((v - np.median(v)) / (v.std() or 1)) ** 2 for v in (x, y))
    top = set(np.argsort(-far)[:label_top].tolist())
    shown, sides = beside(x, y, {i: names[i] for i in sorted(top, key=lambda i: -far[i])})
    labels = dict(x=x_label, y=y_label)
    fig = px.scatter(x=x, y=y, hover_name=names, labels=labels, render_mode="svg")
    hover = f"%{{hovertext}}<br>{x_label}: %{{x:.3f}}<br>{y_label}: %{{y:.3f}}<extra></extra>"
    dots = dict(size=8, opacity=0.7, line=dict(width=0.5, color="white"))
    fig.update_traces(hovertemplate=hover, cliponaxis=False, marker=dots)
    for axes in (fig.update_xaxes, fig.update_yaxes):  # on which side of zero a point lies is told
        axes(rangemode="tozero", zeroline=True, zerolinecolor="#888")
    if at := [i for i, text in enumerate(shown) if text]:  # a trace of their own, or each point
        sides, shown = ([texts[i] for i in at] for texts in (sides, shown))  # would have a text
        # unseen dots hold the texts as far off as the dots that are seen
        look = dict(mode="markers+text", marker=dots | dict(opacity=0), textposition=sides)
        look |= dict(cliponaxis=False, hoverinfo="skip")
        fig.add_scatter(x=x[at], y=y[at], text=shown, showlegend=False, **look)
    if diagonal:
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        line = dict(mode="lines", line=MARK | dict(color="#999"), zorder=-1, hoverinfo="skip")
        fig.add_scatter(x=ends, y=ends, name="y = x", showlegend=True, **line)
    return titled(fig, title, "", height=500)


def attention(
    tokens: Names, patterns: Float[Tensor, "head dest src"], names: Names | None = None
) -> None:
    """Show some heads' attention on one text (circuitsvis): hover over a token, choose a head.

    With MECH_INTERP_STATIC=1 it is a light view and a still picture. Raises ValueError when tokens,
    patterns and names do not fit together.
    """
    from circuitsvis.attention import attention_heads
    from IPython.display import HTML, display

    _check_kind("tokens", tokens, LISTS, "a list")
    p, n = _array(patterns, "patterns", 3), len(tokens)
    if p.shape[1:] != (n, n):
        raise ValueError(f"patterns: got {list(p.shape)}, want [head {n} {n}] for {n} tokens")
    _check_length("names", names, len(p), "heads")
    tokens = [str(t) for t in tokens]
    names = [f"head {i}" for i in range(len(p))] if names is None else [str(n) for n in names]
    view = attention_heads(p.round(3).tolist(), tokens, attention_head_names=names)
    static = os.environ.get("MECH_INTERP_STATIC") == "1"
    # The local form carries circuitsvis' script (1.3 MB) and needs no network.
    page = view.cdn_src if static else view.local_src
    for texts in map(json.dumps, (tokens, names)):  # a token `</script>` would end the script
        page = page.replace(texts, texts.replace("<", "\\u003c"))
    display(HTML(framed(page, names)))
    if static:  # GitHub strips the script, so a picture follows
        title = f"Attention of {', '.join(names)}"
        words = dict(x_label="source", y_label="destination", value_label="attention", title=title)
        heatmap(dict(zip(names, p, strict=True)), x=tokens, y=tokens, limit=1, **words).show()


def _maps(values: Map | Mapping[str, Map]) -> dict[str, np.ndarray]:
    """Each map [row col] as float64, by name (one alone has none). Raises as `_array`."""
    maps = values if isinstance(values, Mapping) else {"": values}
    return {name: _array(v, f"values {name}".strip(), 2) for name, v in maps.items()}


def _largest(scores: np.ndarray, n: int, head_label: str) -> str:
    """The heads of the n cells farthest from zero; a short name is of query heads alone."""
    order = np.argsort(-abs(np.nan_to_num(scores)), axis=None)[:n]
    where = zip(*np.unravel_index(order, scores.shape), strict=True)
    if head_label == "head":
        return ", ".join(f"L{layer}H{head}" for layer, head in where)
    return ", ".join(f"layer {layer} {head_label} {head}" for layer, head in where)


def _array(values: Numbers, name: str, *ndims: int) -> np.ndarray:
    """The values as float64; ValueError naming `name` unless their dimensions are among `ndims`."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be numbers; got {kind_of(values)}") from None
    if array.ndim not in ndims or array.size == 0:
        want = " or ".join(map(str, ndims))
        raise ValueError(f"{name}: got shape {list(array.shape)}, want {want} non-empty dimensions")
    return array


def _check_kind(name: str, value: object, kind: type, wanted: str) -> None:
    if not isinstance(value, kind):
        raise BadArgument(f"{name} must be {wanted}; got {kind_of(value)}")


def _check_pair(name: str, pair: object, second: type) -> None:
    kinds = list(map(type, pair)) if isinstance(pair, Sequence) else []
    fits = len(kinds) == 2 and issubclass(kinds[0], Real) and issubclass(kinds[1], second)
    if pair is not None and not (fits and math.isfinite(pair[0])):
        wanted = f"a finite number and a {'text' if second is str else 'number'}"
        raise BadArgument(f"{name} must be {wanted}; got {kind_of(pair)}")


def _check_length(name: str, items: Sequence | None, want: int, of: str) -> None:
    if items is None:
        return
    _check_kind(name, items, LISTS, "a list")
    if len(items) != want:
        raise ValueError(f"{name}: got {len(items)} entries, want {want} (the number of {of})")


def _with_error(series: object, name: str, n: int) -> tuple[np.ndarray, np.ndarray | None]:
    """A series (see the top of this file) as (y, stderr or None), of `n` values each."""
    if isinstance(series, tuple):
        y, stderr = _array(series[0], name, 1), _array(series[1], f"stderr of {name}", 1)
    else:
        y, stderr = _array(series, name, 1, 2), None
    if y.ndim == 2:  # [prompt x]
        stderr = y.std(0, ddof=1) / len(y) ** 0.5 if len(y) > 1 else None
        y = y.mean(0)
    _check_length(name, y, n, "x values")
    _check_length(f"stderr of {name}", stderr, n, "x values")
    return y, None if stderr is None else np.nan_to_num(stderr)  # one sample has no error


def _ticks(labels: Sequence | None, n: int, room: int) -> dict:
    """Ticks at whole positions; labels may repeat (tokens do), so they are text, not categories."""
    step = math.ceil(n / max(room, 1))
    if labels is None:
        return dict(nticks=min(n, room) + 1, tickformat="d")
    text = [escaped(label) for label in labels[::step]]
    return dict(tickvals=list(range(0, n, step)), ticktext=text)
