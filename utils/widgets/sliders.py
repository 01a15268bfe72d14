"""Figures with a slider of plotly's own: they move without a kernel, in pages too.

A frame holds what changes from step to step, nothing else. Where a kernel runs,
`controls.by_steps` puts a slider for the keyboard over them.
"""

from collections.abc import Mapping, Sequence, Set

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from utils.circuit import PLACES, Node
from utils.look import COLOURS, MAPS, by_layer, line_looks, titled
from utils.metrics import Estimate
from utils.toy import ToyRun
from utils.typed import checked

NOW = dict(size=10, color="#222", symbol="diamond")  # where the slider stands


@checked
def with_slider(
    figure: go.Figure, frames: Sequence[tuple[str, Mapping[int, object]]], what: str, start: int
) -> go.Figure:
    """The figure as frame number `start` shows it, with a slider through all frames.

    A frame is its label on the slider and what changes, by number of the trace. ValueError for a
    start that is none of them.
    """
    if not 0 <= start < len(frames):
        raise ValueError(f"start must lie in 0..{len(frames) - 1}, got {start}")
    figure.frames = [
        go.Frame(name=str(i), data=list(changes.values()), traces=list(changes))
        for i, (_, changes) in enumerate(frames)
    ]
    show_frame(figure, figure.frames[start])
    at_once = dict(mode="immediate", frame=dict(duration=0, redraw=True), transition_duration=0)
    steps = [
        dict(method="animate", label=label, args=[[str(i)], at_once])
        for i, (label, _) in enumerate(frames)
    ]
    value = dict(prefix=f"{what}: ", font_size=14)
    slider = dict(active=start, currentvalue=value, steps=steps, pad=dict(t=72, b=30))
    return figure.update_layout(sliders=[slider])


def show_frame(figure: go.Figure, frame: go.Frame) -> None:
    """Put what the frame changes into the figure."""
    for trace, change in zip(frame.traces, frame.data, strict=True):
        figure.data[trace].update(change.to_plotly_json())


@checked
def toy_training(run: ToyRun, at: float) -> go.Figure:
    """Attention of every head, losses and scores of a toy, at one step of its training at a time.

    It opens at the snapshot nearest to step `at`. Around it (a quarter of the training) every
    snapshot has a place on the slider, elsewhere every tenth.
    """
    steps, (n_layers, n_heads) = run.steps.tolist(), run.patterns.shape[1:3]
    near = [abs(step - at) <= steps[-1] / 8 for step in steps]
    chosen = [i for i, _ in enumerate(steps) if near[i] or i % 10 == 0 or i == len(steps) - 1]
    heads = [f"L{layer}H{head}" for layer in range(n_layers) for head in range(n_heads)]
    rows = n_layers + 2
    wide = [[dict(colspan=n_heads), *[None] * (n_heads - 1)]] * 2
    specs = [[{}] * n_heads for _ in range(n_layers)] + wide
    look = dict(
        vertical_spacing=0.07, horizontal_spacing=0.03, row_heights=[1.5] * n_layers + [1, 1]
    )
    figure = make_subplots(rows, n_heads, specs=specs, subplot_titles=heads, **look)
    # whole percents in one byte each: the page holds a map for every head and step
    percent = (100 * run.patterns).round().byte().flatten(1, 2).numpy()
    for i, head in enumerate(heads):
        hover = f"{head}, from %{{y}} to %{{x}}: %{{z}} %<extra></extra>"
        scale = dict(zmin=0, zmax=100, colorscale=MAPS, showscale=False, hovertemplate=hover)
        figure.add_heatmap(**scale, row=1 + i // n_heads, col=1 + i % n_heads)
    scores = run.prefix_matching.flatten(1)
    curves = {"first copy": run.first_loss, "second copy": run.second_loss}
    curves |= dict(zip(heads, scores.T, strict=True))
    looks = line_looks(list(curves))
    first = {of[0]: f"layer {layer}" for layer, of in by_layer(heads).items()}  # for the legend
    for name, values in curves.items():
        colour, dash = looks[name]
        line, row = dict(color=colour, dash=dash, width=2), rows - 1 + (name in heads)
        y = values.numpy().round(3)
        look = dict(name=name, mode="lines", line=line, showlegend=name not in heads)
        figure.add_scatter(x=steps, y=y, **look, row=row, col=1)
        if name in first:
            key = dict(name=first[name], mode="lines", line_color=colour, showlegend=True)
            figure.add_scatter(x=[None], y=[None], **key, row=row, col=1)
    for row in (rows - 1, rows):
        figure.add_scatter(mode="markers", marker=NOW, showlegend=False, row=row, col=1)
    ends, n = [2, len(heads)], len(figure.data)  # curves in either panel

    def frame(i: int) -> dict[int, object]:
        y = [values[i].item() for values in curves.values()]
        parts = y[: ends[0]], y[ends[0] :]
        maps = {k: go.Heatmap(z=percent[i, k]) for k in range(len(heads))}
        dots = [go.Scatter(x=[steps[i]] * len(part), y=np.round(part, 3)) for part in parts]
        return maps | {n - 2: dots[0], n - 1: dots[1]}

    for layer in range(1, n_layers + 1):
        figure.update_xaxes(showticklabels=False, ticks="", row=layer)
        square = dict(constrain="domain", constraintoward="top", autorange="reversed")
        figure.update_yaxes(showticklabels=False, ticks="", **square, row=layer)
        for col in range(1, n_heads + 1):
            x = figure.get_subplot(layer, col).xaxis.plotly_name.replace("axis", "")
            figure.update_yaxes(scaleanchor=x, row=layer, col=col)
        figure.update_xaxes(constrain="domain", row=layer)
    figure.update_yaxes(title="loss (nats)", row=rows - 1)
    figure.update_yaxes(title="prefix matching", range=[0, 1], row=rows)
    for row in (rows - 1, rows):
        figure.update_xaxes(range=[0, 1.02 * steps[-1]], row=row)
    figure.update_xaxes(title="step", row=rows)
    note = "maps: from (down) to (across), two copies of a few tokens; darker is more attention"
    titled(figure, "Training, step by step", note, 34, height=200 * n_layers + 500)
    start = min(range(len(chosen)), key=lambda k: abs(steps[chosen[k]] - at))
    frames = [(str(steps[i]), frame(i)) for i in chosen]
    return with_slider(figure, frames, "training step", start)


@checked
def circuits_by_threshold(
    contributions: Mapping[Node, float],
    kept: Mapping[int, Mapping[str, Estimate]],
    named: Set[Node],
) -> go.Figure:
    """The circuit of all nodes above a threshold, its size, and what it keeps.

    `contributions`: nodes from the largest on, as shares; `kept`: number of nodes to the share
    that they keep, by group of prompts; `named`: nodes that have a role. One step a size. Raises
    ValueError for no sizes, one larger than the number of nodes, or a node at none of `PLACES`.
    """
    nodes, sizes = list(contributions), sorted(kept)
    if not sizes or sizes[-1] > len(nodes):
        raise ValueError(f"kept: want sizes of 1..{len(nodes)} nodes, got {sizes}")
    if lacking := {place for _, place in nodes} - {*PLACES}:
        raise ValueError(f"contributions: no place {lacking.pop()!r} among {PLACES}")
    groups = list(kept[sizes[0]])
    titles = ["the circuit", "what it keeps"]
    look = dict(subplot_titles=titles, column_widths=[0.5, 0.5], horizontal_spacing=0.17)
    figure = make_subplots(1, 2, **look)
    most = max(head.head for head, _ in nodes) + 1
    across = [PLACES.index(place) + 0.6 * (head.head + 0.5) / most - 0.3 for head, place in nodes]
    for name, colour in (("has a role", COLOURS[2]), ("has none", COLOURS[3])):
        dots = dict(size=9, color=colour, symbol="circle" if name == "has a role" else "square")
        figure.add_scatter(
            mode="markers", marker=dots, name=name, hoverinfo="text", showlegend=True, row=1, col=1
        )
    for i, group in enumerate(groups):
        means, errors = zip(
            *((kept[n][group].mean, kept[n][group].stderr) for n in sizes), strict=True
        )
        line = dict(color=COLOURS[i], width=2, dash=("solid", "dash", "dot")[i % 3])
        bars = dict(array=errors, thickness=1)
        look = dict(mode="lines+markers", line=line, error_y=bars, name=group)
        figure.add_scatter(x=sizes, y=means, **look, row=1, col=2)
    figure.add_scatter(mode="markers", marker=NOW, showlegend=False, row=1, col=2)
    last = len(figure.data) - 1

    def frame(n: int) -> dict[int, object]:
        has_role = [node in named for node in nodes[:n]]
        changes: dict[int, object] = {}
        for trace, wanted in enumerate((True, False)):
            at = [i for i, has in enumerate(has_role) if has == wanted]
            text = [f"{nodes[i]}: {contributions[nodes[i]]:.1%}" for i in at]
            x, y = [round(across[i], 2) for i in at], [nodes[i][0].layer for i in at]
            changes[trace] = go.Scatter(x=x, y=y, text=text)
        y = [round(kept[n][group].mean, 3) for group in groups]
        return changes | {last: go.Scatter(x=[n] * len(y), y=y)}

    x = dict(tickvals=list(range(len(PLACES))), ticktext=PLACES, range=[-0.5, len(PLACES) - 0.5])
    figure.update_xaxes(title="place", row=1, col=1, **x)
    deepest = max(head.layer for head, _ in nodes)
    figure.update_yaxes(title="layer", range=[-1, deepest + 1], row=1, col=1)
    figure.update_xaxes(title="nodes", row=1, col=2)
    figure.update_yaxes(title="share kept", row=1, col=2)
    note = (
        "nodes that contribute at least the threshold; share kept of the logit difference, ± one "
    )
    note += "standard error"
    titled(figure, "Every node above a threshold", note, 34, height=500)
    frames = [(f"{contributions[nodes[n - 1]]:.1%} ({n} nodes)", frame(n)) for n in sizes]
    return with_slider(figure, frames, "threshold", len(sizes) // 2)
