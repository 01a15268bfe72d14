"""Figures carry the data, labels and colours they were given; bad shapes are refused."""

import importlib
import math
import re

import numpy as np
import plotly.io as pio
import pytest
import torch
from contrast import contrast

from utils import look, plotting

TITLE = dict(title="t")
LINES = dict(title="t", x_label="step", y_label="loss (nats)")
BARS = dict(title="t", y_label="loss")
AXES = dict(title="t", x_label="p", y_label="q")
MEAN, STDERR = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.1, 0.2, 0.3])
SAMPLES = MEAN + STDERR * torch.tensor([[-1.0], [1.0]])  # [prompt x], of that mean and error
X, Y = torch.tensor([0.0, 0.1, 0.0, 5.0]), torch.tensor([0.0, 0.1, 0.1, 4.0])
PATTERN = torch.tensor([[[1.0, 0.0], [0.4567, 0.5433]]])  # [head dest src]


def titles(fig):
    return [part.title.text for part in (fig.layout, fig.layout.xaxis, fig.layout.yaxis)]


def test_heatmap_keeps_values_labels_and_order():
    values = torch.tensor([[0.0, 0.5, 1.0], [0.25, -0.0, 2.0]])
    names = dict(x_label="token", y_label="layer", value_label="score")
    fig = plotting.heatmap(values, x=["a", "a", "<b>"], y=[3, 4], **TITLE, **names)
    assert np.allclose(fig.data[0].z, values)
    assert titles(fig) == ["t", "token", "layer"]
    assert fig.layout.xaxis.ticktext == (
        "a",
        "a",
        "&lt;b&gt;",
    )  # a repeated token stays two columns
    assert (fig.layout.yaxis.ticktext, fig.layout.yaxis.autorange) == (("3", "4"), "reversed")
    assert "layer: %{y}<br>token: %{x}<br>score: %{z" in fig.data[0].hovertemplate
    assert fig.layout.title.subtitle.text == "score: darker is more"


@pytest.mark.parametrize(
    ("values", "options", "ends"),
    [
        ([[0.2, -0.7], [0.1, 0.0]], dict(diverging=True), (-0.7, 0.7)),
        ([[0.2, 0.7], [0.1, float("nan")]], {}, (0.0, 0.7)),
        ([[0.2, -0.7], [0.1, 0.0]], {}, (-0.7, 0.2)),
        ([[0.2, 0.7], [0.1, 0.0]], dict(limit=1), (0.0, 1.0)),
        ([[0.0, 0.0], [0.0, 0.0]], dict(diverging=True), (-1.0, 1.0)),
        ([[float("nan")]], dict(diverging=True), (-1.0, 1.0)),
    ],
)
def test_scale_is_centred_when_diverging_and_starts_at_zero_when_not(values, options, ends):
    axis = plotting.heatmap(torch.tensor(values), **TITLE, **options).layout.coloraxis
    assert (axis.cmin, axis.cmax) == pytest.approx(ends)


def test_several_heatmaps_share_one_scale_and_are_light():
    maps = {"q": torch.zeros(2, 3), "k": torch.ones(2, 3) * 4}
    fig = plotting.head_heatmap(maps, title="Effect", diverging=True)
    assert [list(trace.z[0]) for trace in fig.data] == [[0, 0, 0], [4, 4, 4]]
    assert {trace.coloraxis for trace in fig.data} == {"coloraxis"}
    assert [a.text for a in fig.layout.annotations] == ["q", "k"]
    assert fig.layout.coloraxis.cmax == 4
    light = plotting.head_heatmap({n: torch.rand(30, 9) for n in "abc"}, title="t")
    assert len(light.to_json()) < 12_000


@pytest.mark.parametrize("series", [(MEAN, STDERR), (MEAN.tolist(), STDERR.tolist()), SAMPLES])
def test_lines_with_bands_and_marker(series):
    fig = plotting.lines([0, 1, 2], {"two": series, "one": MEAN + 1}, marker=(1, "drop"), **LINES)
    band, two, one = fig.data
    assert np.allclose(band.y, [3.1, 2.2, 1.3, 0.7, 1.8, 2.9])
    assert list(band.x) == [0, 1, 2, 2, 1, 0]
    assert (two.name, list(two.y)) == ("two", pytest.approx([3, 2, 1]))
    assert (one.name, list(one.y)) == ("one", [4, 3, 2])
    assert (fig.layout.shapes[0].x0, fig.layout.annotations[0].text) == (1, "drop")
    assert "one standard error" in fig.layout.title.subtitle.text
    assert titles(fig) == ["t", "step", "loss (nats)"]


@pytest.mark.parametrize("y", [[1, 2], torch.tensor([[1.0, 2.0]])])
def test_one_line_or_one_sample_has_no_legend_no_band_and_no_note(y):
    fig = plotting.lines([0, 1], {"loss": y}, **LINES)
    assert [list(trace.y) for trace in fig.data] == [[1, 2]]
    assert not fig.layout.showlegend and not fig.layout.title.subtitle.text


def test_styles_stay_apart_for_eleven_lines():
    fig = plotting.lines([0, 1], {f"L0H{i}": [0, i] for i in range(11)}, **LINES)
    assert len({(t.line.color, t.line.dash) for t in fig.data}) == 11


def test_panels_share_x_and_colours_and_have_a_legend_each():
    a, b = {"two": [1.0, 2.0], "one": [2.0, 2.0]}, {"two": [0.0, 1.0], "L1H0": [0.5, 0.5]}
    panels, marker = {"loss": a, "score": b}, (50, "drop")
    fig = plotting.panels([0, 50], panels, title="t", x_label="step", marker=marker)
    assert [t.name for t in fig.data if t.legend == "legend2"] == ["two", "L1H0"]
    assert fig.layout.showlegend and fig.layout.legend.y > fig.layout.legend2.y
    assert fig.data[0].line.color == fig.data[2].line.color
    assert fig.layout.xaxis.matches == "x2"
    assert titles(fig) == ["t", None, "loss"]
    assert (fig.layout.xaxis2.title.text, fig.layout.yaxis2.title.text) == ("step", "score")
    assert len(fig.layout.shapes) == 2  # the marker crosses both panels
    assert fig.layout.title.subtitle.text == "dashed: drop"


def test_bars_single_and_grouped_and_of_samples():
    values, baseline = torch.tensor([1.0, 2.0]), (4.0, "first copy")
    fig = plotting.bars(["none", "zero"], values, [0.1, float("nan")], baseline=baseline, **BARS)
    assert (list(fig.data[0].x), list(fig.data[0].y)) == (["none", "zero"], [1, 2])
    assert list(fig.data[0].error_y.array) == [0.1, 0.0]  # an undefined error draws no bar
    assert fig.layout.annotations[0].text == "first copy"
    assert fig.layout.title.subtitle.text == "error bars: ± one standard error"
    fig = plotting.bars([1, 2, 3], {"a": [1, 2, 3], "b": SAMPLES, "c": (MEAN, STDERR)}, **BARS)
    a, b, c = fig.data
    assert (a.name, b.name, c.name, fig.layout.xaxis.type) == (*"abc", "category")
    assert a.error_y.array is None
    assert np.allclose([b.y, c.y], MEAN)
    assert np.allclose([b.error_y.array, c.error_y.array], STDERR)


def test_scatter_labels_the_farthest_points_and_names_heads():
    fig = plotting.scatter(X, Y, names="abcd", label_top=1, diagonal=True, **AXES)
    points, labels, diagonal = fig.data
    assert list(diagonal.x) == list(diagonal.y) == [0, 5]
    assert (list(labels.text), list(labels.x), list(labels.y)) == (["d"], [5], [4])
    assert list(points.hovertext) == ["a", "b", "c", "d"]
    assert titles(fig) == ["t", "p", "q"]
    points, labels = plotting.scatter(X.view(2, 2), Y.view(2, 2), label_top=1, **AXES).data
    assert list(points.hovertext) == ["L0H0", "L0H1", "L1H0", "L1H1"]
    assert list(labels.text) == ["L1H1"]
    assert np.allclose(points.x, X) and np.allclose(points.y, Y)


@pytest.mark.parametrize("static", ["0", "1"])
def test_attention_is_light_and_with_a_picture_only_when_static(monkeypatch, static):
    shown, pictures = [], []
    monkeypatch.setattr("IPython.display.display", lambda item: shown.append(item.data))
    monkeypatch.setattr("plotly.graph_objects.Figure.show", lambda fig: pictures.append(fig))
    monkeypatch.setenv("MECH_INTERP_STATIC", static)
    plotting.attention(["<s>", " a"], PATTERN, names=["L5H5"])
    (html,) = shown
    assert "0.457" in html and "0.4567" not in html
    assert 'role="img" aria-label="Attention of L5H5"' in html
    if static == "1":
        assert len(html) < 5_000
        assert np.allclose(pictures[0].data[0].z, PATTERN[0])
    else:
        assert len(html) > 500_000 and not pictures


def test_colours_stand_out_and_dashes_and_hatching_tell_lines_and_bars_apart():
    assert all(contrast(colour, "#ffffff") >= 3 for colour in look.COLOURS)
    heads = {f"L{layer}H{head}": [0, 1] for layer in range(2) for head in range(4)}
    fig = plotting.lines([0, 1], heads, **LINES)
    by_layer = [{t.line.color for t in fig.data if t.name.startswith(f"L{i}")} for i in range(2)]
    assert [len(colours) for colours in by_layer] == [1, 1] and by_layer[0] != by_layer[1]
    heads = [t for t in fig.data if t.name in heads]
    assert len({(t.line.color, t.line.dash) for t in heads}) == 8
    bars = plotting.bars(["a"], {"one": [1], "two": [2]}, **BARS).data
    assert bars[0].marker.pattern.shape != bars[1].marker.pattern.shape


def test_few_points_are_marked_a_window_shaded_and_an_axis_may_be_logarithmic():
    many = plotting.lines(range(40), {"loss": range(40)}, window=(3, 9), **LINES)
    assert (many.data[0].mode, many.layout.shapes[0].x0, many.layout.shapes[0].x1) == (
        "lines",
        3,
        9,
    )
    few = plotting.lines([1, 2, 8], {"loss": [3, 2, 1]}, log_x=True, marker=(2, "two"), **LINES)
    assert few.data[0].mode == "lines+markers"
    assert (few.layout.xaxis.type, few.layout.xaxis.ticktext) == ("log", ("1", "2", "8"))
    assert few.layout.annotations[0].x == pytest.approx(math.log10(2))
    assert few.layout.xaxis.range == pytest.approx((-0.05 * math.log10(8), 1.05 * math.log10(8)))
    with pytest.raises(ValueError, match="a logarithmic axis wants numbers above 0, got 0"):
        plotting.lines([0, 2, 8], {"loss": [3, 2, 1]}, log_x=True, **LINES)
    both = plotting.lines([1, 2, 8], {"loss": [3, 2, 1]}, log_y=True, **LINES)
    assert (few.layout.yaxis.type, both.layout.yaxis.type) == (None, "log")


def test_titles_break_at_the_width_of_a_page_and_take_the_room_of_their_lines():
    title = "What each head writes, before and after the name movers are all knocked out at once"
    fig, short = (plotting.scatter(X, Y, **AXES | dict(title=t)) for t in (title, title[:60]))
    rows = fig.layout.title.text.split("<br>")
    assert " ".join(rows) == title and max(map(len, rows)) <= look.TITLE_WIDTH and len(rows) == 2
    assert "<br>" not in short.layout.title.text
    assert fig.layout.margin.t - short.layout.margin.t == 22
    noted = plotting.bars(["a"], [1], [0.1], **BARS)  # with a line under the title
    assert noted.layout.margin.t - plotting.bars(["a"], [1], **BARS).layout.margin.t == 18


def test_names_of_bars_and_axes_are_no_longer_than_their_place():
    fig = plotting.bars(["negative_name_mover", "s_inhibition"], [1, 2], **BARS)
    assert list(fig.data[0].x) == ["negative name<br>mover", "S-inhibition"]
    long = "attention to labels of the same kind, beyond the rest"
    for fig, most in (
        (plotting.scatter(X, Y, **AXES | dict(y_label=long)), 45),
        (
            plotting.panels(
                [0, 1], {long: {"a": [0, 1]}, "b": {"a": [0, 1]}}, title="t", x_label="x"
            ),
            30,
        ),
    ):
        rows = fig.layout.yaxis.title.text.split("<br>")
        assert " ".join(rows) == long and max(map(len, rows)) <= most


def test_lines_of_heads_are_named_at_their_ends_and_a_layer_once_in_the_legend():
    ends = dict(
        zip([f"L{i}H{j}" for i in (0, 1) for j in range(4)], [0] * 4 + [9, 9, 9, 7], strict=True)
    )
    panels = {"loss": {"first copy": [4, 4]}, "score": {name: [0, y] for name, y in ends.items()}}
    fig = plotting.panels([0, 1], panels, title="t", x_label="step")
    shown = [t.name for t in fig.data if t.showlegend is not False]
    assert shown == ["first copy", "layer 0", "layer 1"]
    assert [a.text for a in fig.layout.annotations] == ["L0H0–3", "L1H3", "L1H0–2"]
    assert look.end_labels({"L0H0": 1.0, "L1H1": 1.0, "L1H3": 1.01}, 10) == [
        (1.0, "L0H0"),
        (2.0, "L1H1,3"),
    ]


def test_a_name_has_one_look_in_every_figure():
    names = ["first copy", "second copy", "in-context-learning score"]
    heads = [f"L{layer}H{head}" for layer in range(2) for head in range(4)]
    looks = look.line_looks([*names, *heads])
    for some in (names[:2], [*names, *heads[:4]], [*names[:2], *heads]):
        assert look.line_looks(some) == {name: looks[name] for name in some}
    names = [f"{kind}, {heads}" for heads in ("induction", "control") for kind in ("zero", "mean")]
    (a, b, c, d) = look.line_looks(names).values()
    assert a[0] == c[0] != b[0] == d[0] and a[1] == b[1] != c[1] == d[1]


def test_maps_of_many_layers_are_low_and_every_fifth_is_labelled():
    maps = {"keys": torch.rand(30, 3), "values": torch.rand(30, 3)}
    fig = plotting.head_heatmap(maps, title="t", diverging=True)
    assert fig.layout.height < 560 and fig.layout.yaxis.dtick == 5
    assert fig.layout.xaxis2.domain[1] == pytest.approx(
        0.6
    )  # cells are not 20 times as wide as high
    assert fig.layout.coloraxis.colorbar.x < 0.7


def test_long_head_maps_name_their_largest_cells():
    effects = torch.zeros(12, 12)
    effects[3, 4], effects[9, 6], effects[7, 1] = 0.5, -2.0, 1.0
    fig = plotting.head_heatmap(effects, title="t", diverging=True)
    text = fig.layout.title.subtitle.text.replace("<br>", " ")
    assert text == "score: red above 0, blue below, full at ±2; largest: L9H6, L7H1, L3H4"
    fig = plotting.head_heatmap({"q": effects, "k": effects.flip(0)}, title="t")
    assert "largest: q L9H6, k L2H6" in fig.layout.title.subtitle.text
    shared = plotting.head_heatmap(effects, title="t", head_label="key/value head")
    assert "largest: layer 9 key/value head 6," in shared.layout.title.subtitle.text


def test_labels_of_a_scatter_never_meet():
    x = torch.tensor([0.0, 10.0, 10.01, 10.02, 10.0, 10.0])
    y = torch.tensor([0.0, 10.0, 10.0, 10.0, 10.0, 10.0])
    fig = plotting.scatter(x, y, names=[f"L17H{i}" for i in range(6)], label_top=6, **AXES)
    sides = fig.data[1].textposition[1:]  # the first point stands elsewhere
    assert len({*sides}) == len(sides) >= 2


Z = torch.zeros
REFUSED = [
    (plotting.heatmap, [Z(3)], TITLE, r"values: got shape \[3\]"),
    (plotting.heatmap, [Z(0, 3)], TITLE, "non-empty"),
    (plotting.heatmap, [{}], TITLE, "values: want maps of one shape"),
    (plotting.heatmap, [{"a": Z(2, 2), "b": Z(2, 3)}], TITLE, "want maps of one shape"),
    (plotting.heatmap, [{"a": Z(2, 2), "b": Z(2)}], TITLE, r"values b: got shape \[2\]"),
    (plotting.heatmap, [Z(2, 3)], TITLE | dict(x=["a"]), "x: got 1 entries, want 3"),
    (plotting.heatmap, [Z(2, 3)], TITLE | dict(y=["a"]), "y: got 1 entries, want 2"),
    (plotting.lines, [[0, 1], {}], LINES, "series: got none"),
    (plotting.lines, [[0, 1], {"a": [1.0]}], LINES, "a: got 1 entries, want 2"),
    (plotting.lines, [[0, 1], {"a": Z(2, 3)}], LINES, "a: got 3 entries, want 2"),
    (plotting.lines, [[0, 1], {"a": Z(2, 2, 2)}], LINES, r"a: got shape \[2, 2, 2\]"),
    (plotting.lines, [[0, 1], {"a": (Z(2, 2), Z(2))}], LINES, r"a: got shape \[2, 2\]"),
    (plotting.lines, [[0, 1], {"a": (Z(2), Z(1))}], LINES, "stderr of a: got 1 entries, want 2"),
    (plotting.bars, ["ab", [1.0]], BARS, "values: got 1 entries, want 2"),
    (plotting.bars, ["a", {"s": [1.0]}, [0.1]], BARS, "errors: "),
    (plotting.scatter, [X, Y[:3]], AXES, r"y: got shape \[3\], want that of x, \[4\]"),
    (plotting.scatter, [X, Y.view(2, 2)], AXES, r"y: got shape \[2, 2\]"),
    (plotting.scatter, [X, Y], AXES | dict(names=["a"]), "names: got 1 entries, want 4"),
    (plotting.attention, ["a", PATTERN], {}, r"patterns: got \[1, 2, 2\], want \[head 1 1\]"),
    (plotting.attention, ["ab", PATTERN, "xy"], {}, "names: got 2 entries, want 1"),
]


@pytest.mark.parametrize(("function", "given", "options", "message"), REFUSED)
def test_bad_input_is_named(function, given, options, message):
    with pytest.raises(ValueError, match=message):
        function(*given, **options)


@pytest.mark.parametrize(
    ("chosen", "asked", "renderer"),
    [
        ("plotly_mimetype", None, "plotly_mimetype+notebook"),  # JupyterLab
        ("plotly_mimetype", "plotly_mimetype", "plotly_mimetype"),
        ("vscode", None, "vscode"),
        ("colab", None, "colab"),
    ],
)
def test_figures_carry_their_script_where_plotly_chose_the_bare_form(
    monkeypatch, chosen, asked, renderer
):
    monkeypatch.delenv("PLOTLY_RENDERER", raising=False)
    if asked:
        monkeypatch.setenv("PLOTLY_RENDERER", asked)
    monkeypatch.setattr(pio.renderers, "default", chosen)
    importlib.reload(look)
    assert pio.renderers.default == renderer


def test_a_figure_with_its_script_asks_no_network():
    html = pio.renderers["notebook"].to_mimebundle(plotting.bars(["a"], [1], **BARS).to_dict())
    assert "Plotly.newPlot" in html["text/html"]
    assert not re.search(r'(src|href)="http', html["text/html"])


def test_a_series_that_ends_early_has_a_band_of_its_own_length():
    nan = float("nan")
    series = {"short": (torch.tensor([1.0, 2.0, nan]), torch.tensor([0.1, 0.2, nan]))}
    fig = plotting.lines([5, 10, 15], series, title="t", x_label="x", y_label="y")
    band = next(trace for trace in fig.data if trace.fill == "toself")
    assert list(band.x) == [5, 10, 10, 5]
    assert list(band.y) == pytest.approx([1.1, 2.2, 1.8, 0.9])
