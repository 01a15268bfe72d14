"""A figure in words says what is seen, whichever way plotly stores its numbers."""

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

from tools.words import alt_text
from utils import plotting
from utils.diagram import circuit_diagram
from utils.heads import Head

LOOK = dict(title="t", x_label="x", y_label="y")


def words(figure: go.Figure) -> str:
    return alt_text(figure.to_plotly_json())


def test_a_map_names_its_largest_cell_and_its_smallest_below_zero():
    effect = torch.zeros(30, 9)
    effect[23, 3], effect[29, 0] = 0.55, -0.24
    look = dict(title="Patched", x_label="head", y_label="layer", diverging=True)
    said = words(plotting.heatmap({"z": effect, "none": effect.clamp(min=0)}, **look))
    assert said.startswith("Patched. 2 maps: few cells stand out, 2 of 540 at least half")
    assert "z: largest 0.55 at layer 23, head 3, smallest −0.24 at layer 29, head 0" in said
    assert said.endswith("none: largest 0.55 at layer 23, head 3")


def test_a_map_of_attention_leaves_out_the_first_token():
    attention = torch.eye(5)
    attention[:, 0] = 1
    attention[4, 2] = 0.9
    attention[3, 3] = attention[1, 1] = attention[2, 2] = attention[4, 4] = 0
    said = words(plotting.heatmap(attention, title="Attention", x=list("abcde"), y=list("abcde")))
    assert said.endswith("largest 0.9 at e, c")


def test_a_line_says_its_ends_and_where_it_turns():
    loss = torch.tensor([4.0, 5.0, 2.0, 0.001])
    samples = loss + torch.tensor([[0.1], [-0.1]])
    lines = plotting.lines([1, 2, 3, 4], {"a": loss, "b": samples}, **LOOK)
    said = words(lines)
    assert "a: from 4 at 1 to 0 at 4, highest 5 at 2" in said
    assert "b: from 4 at 1 to 0 at 4, highest 5 at 2" in said
    apart = plotting.panels(
        [1, 2], {"up": {"a": [0, 1]}, "down": {"a": [1, 0]}}, title="t", x_label="x"
    )
    assert words(apart).endswith("a (up): from 0 at 1 to 1 at 2; a (down): from 1 at 1 to 0 at 2")
    assert "Lines over x: a (up) rises; a (down) falls. " in words(apart)
    assert words(lines).startswith("t. Lines over x: a and b fall. ")
    assert "y = x" not in words(plotting.scatter(loss, loss, diagonal=True, **LOOK))


def test_bars_are_all_named_or_the_longest_three():
    said = words(plotting.bars(["no_mlp", "zero"], [0.5, -0.0001], title="t", y_label="y"))
    assert said.endswith("no mlp: 0.5, zero: 0")
    assert said.startswith("t. Bars: no mlp is highest, at 0.5; zero is lowest, at 0. ")
    many = plotting.bars(
        [str(i) for i in range(20)], torch.arange(-10.0, 10), title="t", x_label="at", y_label="y"
    )
    assert words(many).endswith("largest of 20: at 0: −10, at 1: −9, at 19: 9")


def test_points_with_a_label_are_named():
    x, y = torch.tensor([0.1, 0.9, 0.2]), torch.tensor([0.2, -0.8, 0.1])
    said = words(plotting.scatter(x, y, names=list("abc"), label_top=1, **LOOK))
    assert "b at (0.9, −0.8)" in said and "a at" not in said
    assert "3 points: their two values go opposite ways (correlation −1)" in said


def test_a_circuit_names_boxes_and_arrows():
    roles, edges = {"s_inhibition": [Head(7, 3)]}, [("s_inhibition", "logits", 0.25, "q")]
    figure = circuit_diagram(roles, edges, levels={"s_inhibition": 0}, title="t")
    said = words(figure)
    assert "S-inhibition L7H3" in said and said.endswith("S-inhibition to logits: q +0.25")
    assert said.startswith("t. 2 boxes, the early ones below, and 1 arrow; widest: S-inhibition to")
    assert "■" not in said and "through the receiver's queries" in said


@pytest.mark.parametrize("z", [[[1.0, None], [0.0, 2.0]], np.array([[1, np.nan], [0, 2.0]])])
def test_what_is_missing_is_passed_over(z):
    said = "A map: many cells are large, 2 of 3 at least half of the largest. largest 2 at 1, 1"
    assert words(go.Figure(go.Heatmap(z=z))) == said
    assert words(go.Figure(go.Heatmap(z=[[None]]))) == ""


def test_a_picture_without_a_figure_is_called_one():
    assert alt_text(None) == "Picture"
