"""A stored figure in words, for those who cannot see it: what is drawn, and what is seen."""

import base64
import html
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

Figure = Mapping  # a figure's JSON, as a notebook stores it
MOST_BARS = 12  # of more, only the longest are named
WAYS = (("rises", "rise"), ("falls", "fall"), ("ends where it began", "end where they began"))


def alt_text(figure: Figure | None) -> str:
    """Title, what is seen in a sentence, and then the figures.

    The line under the title, axes, and of each trace its ends, its bars or its largest cell.
    """
    if figure is None:
        return "Picture"
    layout = figure["layout"]
    title = layout.get("title", {})
    axes = [_axis_title(layout, axis) for axis in ("yaxis", "xaxis")]
    boxes = [shape["label"]["text"] for shape in layout.get("shapes", []) if shape.get("label")]
    lines = title.get("subtitle", {}).get("text", "").split("<br>")
    note = " ".join(line for line in lines if not re.search("[■▲]", line))  # a key of colours
    parts = [title.get("text"), _gist(figure), note]
    parts += [" against ".join(filter(None, axes)), ", ".join(boxes), "; ".join(_seen(figure))]
    text = ". ".join(part for part in parts if part).replace("?. ", "? ").replace("-<br>", "-")
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]*>", " ", text))).strip()


def _gist(figure: Figure) -> str:
    """What kind of picture it is and what stands out, in one sentence."""
    layout, traces = figure["layout"], figure["data"]
    if layout.get("xaxis", {}).get("visible") is False:
        boxes = sum(bool(shape.get("label")) for shape in layout.get("shapes", []))
        widest = max(traces, key=lambda t: t["line"]["width"], default={}).get("name", "none")
        arrows = f"{len(traces)} arrow{'s' * (len(traces) > 1)}"
        return f"{boxes} boxes, the early ones below, and {arrows}; widest: {widest}"
    maps = [_cells(trace) for trace in traces if trace["type"] == "heatmap"]
    bars = [trace for trace in traces if trace["type"] == "bar"]
    curves = [trace for trace in traces if "lines" in trace.get("mode", "") and _curve(trace)]
    found = [_stands_out(np.concatenate([z.ravel() for z in maps]), len(maps))] if maps else []
    found += [_range_of_bars(bars, layout)] if bars else []
    found += [_trends(curves, layout)] if curves else []
    return ". ".join(filter(None, found or [_relation(traces)]))


def _stands_out(z: np.ndarray, n_maps: int) -> str:
    sizes = abs(z[np.isfinite(z)])
    if not sizes.size:
        return ""
    large = sizes >= sizes.max() / 2
    kind = "A map" if n_maps == 1 else f"{n_maps} maps"
    stand = "few cells stand out" if large.mean() < 0.15 else "many cells are large"
    return f"{kind}: {stand}, {large.sum()} of {sizes.size} at least half of the largest"


def _range_of_bars(traces: list[Figure], layout: Figure) -> str:
    ends = []
    for trace in traces:
        across = trace.get("orientation") == "h"
        lengths = _numbers(trace["x" if across else "y"])
        for i in np.flatnonzero(np.isfinite(lengths)):
            name = trace.get("name") if len(traces) > 1 else ""
            tick = _tick(trace, layout, "y" if across else "x", i)
            ends.append((lengths[i], ", ".join(filter(None, [name, tick]))))
    if not ends:
        return ""
    (low, lowest), (high, highest) = min(ends), max(ends)
    return f"Bars: {highest} is highest, at {_short(high)}; {lowest} is lowest, at {_short(low)}"


def _trends(curves: list[Figure], layout: Figure) -> str:
    """Which lines rise, fall or do neither, by a tenth of what their panel spans."""
    panels = {trace.get("yaxis"): [] for trace in curves}
    for trace in curves:
        panels[trace.get("yaxis")].append(_numbers(trace["y"]))
    spans = {name: np.ptp((y := np.concatenate(ys))[np.isfinite(y)]) for name, ys in panels.items()}
    names = [trace["name"] for trace in curves]
    ways: dict[tuple, list[str]] = {way: [] for way in WAYS}
    for trace, name in zip(curves, names, strict=True):
        y = _numbers(trace["y"])
        y = y[np.isfinite(y)]
        share = (y[-1] - y[0]) / (spans[trace.get("yaxis")] or 1)
        of = f" ({_y_title(trace, layout)})" if names.count(name) > 1 else ""
        way = WAYS[0 if share > 0.1 else 1 if share < -0.1 else 2]
        ways[way].append(name.replace(", ", " ") + of)
    axes = [_axis_title(layout, name) for name in layout if name.startswith("xaxis")]
    own = _axis_title(layout, f"xaxis{(curves[0].get('xaxis') or 'x')[1:]}")
    over = next((f" over {axis}" for axis in (own, *reversed(axes)) if axis), "")
    said = [f"{_listed(n)} {one if len(n) == 1 else more}" for (one, more), n in ways.items() if n]
    return f"Lines{over}: {'; '.join(said)}"


def _listed(names: list[str]) -> str:
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _relation(traces: Sequence[Figure]) -> str:
    """How the two values of points go together."""
    points = [t for t in traces if t.get("mode") == "markers" and len(_numbers(t["x"])) > 2]
    if not points:
        ends = [t["text"] for t in traces if "lines" in t.get("mode", "") and t.get("text")]
        return f"A path from {ends[0][0]} to {ends[0][-1]}" if ends else ""
    x, y = (np.concatenate([_numbers(t[name]) for t in points]) for name in "xy")
    r = np.corrcoef(x, y)[0, 1]
    way = "rise together" if r > 0 else "go opposite ways"
    clear = "" if abs(r) > 0.7 else "tend to " if abs(r) > 0.3 else "hardly "
    return f"{len(x)} points: their two values {clear}{way} (correlation {_short(r)})"


def _seen(figure: Figure) -> Iterator[str]:
    """For each trace that says something: its name and what is seen of it."""
    layout = figure["layout"]
    headings = [note["text"] for note in layout.get("annotations", [])]
    panels: list[tuple] = []  # in the order of their headings
    several = "yaxis2" in layout
    measured = layout.get("xaxis", {}).get("visible") is not False  # else a drawing
    for trace in figure["data"]:
        panel = trace.get("xaxis"), trace.get("yaxis")
        panels += [panel] * (panel not in panels)
        name, mode = trace.get("name") or "", trace.get("mode", "")
        if trace["type"] == "heatmap":
            name = dict(enumerate(headings)).get(panels.index(panel), "")
            said = _map(trace, layout)
        elif trace["type"] == "bar":
            said = _bars(trace, layout)
        elif "lines" in mode and measured:
            said = _curve(trace) or ("text" in mode and _labelled(trace))
            name = f"{name} ({_y_title(trace, layout)})" if said and several else name * bool(said)
        else:
            said = _labelled(trace) if "text" in mode else ""
        if name or said:
            yield ": ".join(filter(None, [name, said]))


def _map(trace: Figure, layout: Figure) -> str:
    """The largest cell and, if there are any below zero, the smallest."""
    z = _cells(trace)
    if not np.isfinite(z).any():
        return ""
    ends = [("largest", np.nanargmax(z))]
    ends += [("smallest", np.nanargmin(z))] if np.nanmin(z) < 0 else []
    said = []
    for word, flat in ends:
        row, col = np.unravel_index(flat, z.shape)
        place = f"{_tick(trace, layout, 'y', row)}, {_tick(trace, layout, 'x', col)}"
        said.append(f"{word} {_short(z[row, col])} at {place}")
    return ", ".join(said)


def _cells(trace: Figure) -> np.ndarray:
    """The cells of a map, nan for what every first token does in attention.

    It can look only at itself, and all look at it.
    """
    z = _numbers(trace["z"])
    first = int(z.shape[0] == z.shape[1] > 3 and z[0, 0] == np.nanmax(z))
    z = np.where(np.arange(z.shape[0])[:, None] >= first, z, np.nan)
    z[:, :first] = np.nan
    return z


def _bars(trace: Figure, layout: Figure) -> str:
    across = trace.get("orientation") == "h"
    lengths = _numbers(trace["x" if across else "y"])
    shown = np.arange(len(lengths))
    if len(shown) > MOST_BARS:
        shown = np.sort(np.argsort(-abs(np.nan_to_num(lengths)), kind="stable")[:3])
    letter = "y" if across else "x"
    said = [f"{_tick(trace, layout, letter, i)}: {_short(lengths[i])}" for i in shown]
    of_all = f"largest of {len(lengths)}: " if len(shown) < len(lengths) else ""
    return of_all + ", ".join(said)


def _tick(trace: Figure, layout: Figure, letter: str, index: int) -> str:
    """What stands at a row, column or bar, with the name of its axis where that is a number."""
    axis = layout.get(f"{letter}axis{(trace.get(f'{letter}axis') or letter)[1:]}", {})
    values, at = trace.get(letter), index
    if values is not None:
        at = _numbers(values)[index] if isinstance(values, Mapping) else values[index]
    ticks = dict(zip(axis.get("tickvals", []), axis.get("ticktext", []), strict=False))
    tick = f"{at:g}" if isinstance(at, float) and at not in ticks else str(ticks.get(at, at))
    name = _axis_title(layout, axis) or _axis_title(layout, f"{letter}axis") or ""
    return f"{name} {tick}".strip() if tick.isdigit() else tick.strip()


def _curve(trace: Figure) -> str:
    """Where a line begins and ends, and its turning point if it goes beyond both."""
    x, y = _numbers(trace["x"]), _numbers(trace["y"])
    at = np.flatnonzero(np.isfinite(y))
    if len(at) < 2 or not trace.get("name") or trace["name"] == "y = x":
        return ""
    first, last = at[0], at[-1]
    said = (
        f"from {_short(y[first])} at {_short(x[first])} to {_short(y[last])} at {_short(x[last])}"
    )
    beyond = 0.1 * np.ptp(y[at])
    for word, i in (("highest", np.nanargmax(y)), ("lowest", np.nanargmin(y))):
        if min(abs(y[i] - y[first]), abs(y[i] - y[last])) > max(beyond, 0.01):
            said += f", {word} {_short(y[i])} at {_short(x[i])}"
    return said


def _labelled(trace: Figure) -> str:
    """The points that carry a label, at (x, y)."""
    points = zip(trace["text"], _numbers(trace["x"]), _numbers(trace["y"]), strict=True)
    return ", ".join(f"{text} at ({_short(x)}, {_short(y)})" for text, x, y in points if text)


def _y_title(trace: Figure, layout: Figure) -> str | None:
    return _axis_title(layout, f"yaxis{(trace.get('yaxis') or 'y')[1:]}")


def _axis_title(layout: Figure, axis: str | Figure) -> str | None:
    axis = layout.get(axis, {}) if isinstance(axis, str) else axis
    return axis.get("title", {}).get("text")


def _numbers(values: object) -> np.ndarray:
    """A trace's numbers, unpacked if plotly has packed them; what is missing is nan."""
    if not isinstance(values, Mapping):
        return np.array([np.nan if value is None else value for value in values], float)
    found = np.frombuffer(base64.b64decode(values["bdata"]), values["dtype"]).astype(float)
    shape = [int(n) for n in str(values.get("shape", len(found))).split(",")]
    return found.reshape(shape)


def _short(value: float) -> str:
    text = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return text.replace("-0", "0") if float(text) == 0 else text.replace("-", "−")
