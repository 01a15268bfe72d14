"""The circuit diagram: what stands in it, where, and how wide; bad input is refused."""

import itertools
import re

import numpy as np
import pytest

from utils.diagram import LOWERS, OFF, PAGE, RAISES, circuit_diagram
from utils.heads import Head

ROLES = {
    "early": [Head(0, 1), Head(1, 2)],
    "middle": [Head(3, 0)],
    "twelve": [Head(5, i) for i in range(12)],
    "late": [Head(6, 0)],
    "absent": [],
}
LEVELS = {"early": 0, "middle": 1, "absent": 1, "twelve": 2, "late": 2}
EDGES = [
    ("early", "middle", -0.314, "k"),
    ("middle", "twelve", 0.5, "q"),
    ("twelve", "logits", -1.0),
    ("early", "late", 0.25, "v"),
    ("early", "logits", 0.25),
    ("absent", "logits", 3.0),
]
HEIGHT = LEVELS | {"logits": 3}
PAIRS = itertools.product(ROLES, [*ROLES, "logits"])
DENSE = [(a, b, 1.0) for a, b in PAIRS if HEIGHT[a] < HEIGHT[b] and "absent" not in (a, b)]
CALL = dict(roles=ROLES, edges=EDGES, levels=LEVELS, title="t")
SHORT = {"roles": {"one": [Head(0, 0)]}, "edges": [("one", "logits", 0.0)], "levels": {"one": 5}}
CROWD = {f"a role with a rather long name, {i}": [Head(20, h) for h in range(12)] for i in "abcd"}
CROWDED = dict(roles=CROWD, edges=[], levels=dict.fromkeys(CROWD, 0))


def drawn(**change):
    """The figure, its boxes (rectangles) by name, its arrows (lines), and the texts of these."""
    fig = circuit_diagram(**CALL | change)
    boxes = {re.sub("</b><br><b>", " ", s.label.text): s for s in fig.layout.shapes}
    boxes = {re.search("<b>(.*)</b>", text)[1]: s for text, s in boxes.items()}
    return fig, boxes, fig.data, fig.layout.annotations


def test_every_head_stands_in_its_box_and_empty_roles_are_left_out():
    fig, boxes, _, _ = drawn()
    found = [(role, re.findall(r"L\d+H\d+", box.label.text)) for role, box in boxes.items()]
    drawn_roles = [(role, [str(head) for head in heads]) for role, heads in ROLES.items() if heads]
    assert found == [*drawn_roles, ("logits", [])]
    assert fig.layout.title.text == "t"


def test_a_role_is_followed_by_the_place_where_it_works():
    _, boxes, _, _ = drawn(places={"early": "S1+1", "of another circuit": "END"})
    assert {"early at S1+1", "middle", "late", "logits"} < boxes.keys()


@pytest.mark.parametrize("change", [{}, SHORT, CROWDED])
def test_boxes_stand_by_level_inside_the_page_and_apart_with_room_for_their_text(change):
    fig, boxes, _, _ = drawn(**change)
    levels = (CALL | change)["levels"] | {"logits": 9}
    for (a, one), (b, other) in itertools.combinations(boxes.items(), 2):
        beside = one.x1 < other.x0 or other.x1 < one.x0
        below = one.y1 < other.y0 if levels[a] <= levels[b] else other.y1 < one.y0
        assert below or (beside and levels[a] == levels[b])
    assert fig.layout.width is None and fig.layout.xaxis.range[1] == PAGE  # it fits a phone
    for box in boxes.values():
        assert sum(other.y0 == box.y0 for other in boxes.values()) <= 3
        assert 0 <= box.x0 < box.x1 <= PAGE
        assert 0 <= box.y0 < box.y1 <= fig.layout.yaxis.range[1]
        rows = re.sub("</?b>", "", box.label.text).split("<br>")
        assert max(map(len, rows)) * 6.5 < box.x1 - box.x0 and len(rows) * 16 < box.y1 - box.y0
    # a unit is a pixel, or more: text fits its box
    assert fig.layout.height - fig.layout.margin.t == pytest.approx(fig.layout.yaxis.range[1])


def test_labels_colours_and_widths_tell_the_effects():
    _, _, arrows, labels = drawn()
    assert [a.text for a in labels] == ["k −0.31", "q +0.50", "−1.00", "v +0.25", "+0.25"]
    effects = [effect for sender, _, effect, *_ in EDGES if sender != "absent"]
    assert [a.line.color for a in arrows] == [RAISES if e > 0 else LOWERS for e in effects]
    assert [a.line.width for a in arrows] == pytest.approx([1 + 5 * abs(e) for e in effects])
    _, _, (arrow,), (label,) = drawn(**SHORT)
    assert (arrow.line.width, label.text) == (1, "+0.00")


@pytest.mark.parametrize("edges", [EDGES[:-1], DENSE])
def test_arrows_lead_from_box_to_box_and_cross_none(edges):
    _, boxes, arrows, _ = drawn(edges=edges)
    for (sender, receiver, *_), arrow in zip(edges, arrows, strict=True):
        start, end, path = boxes[sender], boxes[receiver], np.stack([arrow.x, arrow.y], axis=1)
        assert list(path[-2]) == [None, None]  # the head stands apart, or its line would cover it
        assert arrow.marker.symbol == "arrow" and np.flatnonzero(arrow.marker.size) == len(path) - 1
        path = np.delete(path, -2, axis=0).astype(float)
        assert start.x0 < path[0, 0] < start.x1 and path[0, 1] == start.y1
        assert end.x0 < path[-1, 0] < end.x1 and path[-1, 1] == end.y0 - OFF
        upright = np.diff(path[[0, 1, -3, -2, -1]], axis=0)[[0, 2, 3]]  # at both ends
        assert (abs(upright[:, 0]) < upright[:, 1]).all() and upright[-1, 0] == 0
        assert path[-1, 1] - path[-2, 1] < arrow.marker.size[-1] * 0.95  # no gap before the head
        for a, b in itertools.pairwise(path):
            x, y = np.linspace(a, b, 51).T
            for box in boxes.values():
                inside = (box.x0 < x) & (x < box.x1) & (box.y0 + 1 < y) & (y < box.y1 - 1)
                assert not inside.any()


@pytest.mark.parametrize("receiver", ["late", "middle"])
def test_labels_of_parallel_arrows_stand_apart(receiver):
    edges = [("early", receiver, 0.1 * i, via) for i, via in enumerate("qkv", start=1)]
    labels = drawn(edges=edges)[-1]
    assert len(labels) == 3
    for a, b in itertools.combinations(labels, 2):
        assert abs(a.x - b.x) > 48 or abs(a.y - b.y) > 15


def test_arrows_to_the_logits_end_apart_and_the_key_says_what_they_mean():
    fig, boxes, arrows, _ = drawn()
    ends = sorted(arrow.x[-1] for arrow in arrows if arrow.y[-1] == boxes["logits"].y0 - OFF)
    assert len(ends) == 2 and ends[1] - ends[0] > 50
    key = fig.layout.title.subtitle.text
    assert "queries, keys, values" in key and "share of the logit difference lost" in key
    assert "queries" not in drawn(**SHORT)[0].layout.title.subtitle.text


def test_a_row_is_ordered_so_that_arrows_cross_as_little_as_they_can():
    roles = {name: [Head(i, 0)] for i, name in enumerate("abcdef")}
    levels = dict(zip(roles, [0, 0, 0, 1, 1, 1], strict=True))
    edges = [("a", "f", 1.0), ("b", "e", 1.0), ("c", "d", 1.0)]
    _, _, arrows, _ = drawn(roles=roles, levels=levels, edges=edges)
    for one, other in itertools.combinations(arrows, 2):
        assert (one.x[0] - other.x[0]) * (one.x[-1] - other.x[-1]) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(roles={"absent": []}), "no role with heads"),
        (dict(roles={**ROLES, "logits": [Head(9, 9)]}), "'logits' is the box at the top"),
        (dict(levels={"early": 0, "middle": 1}), "levels: got none for twelve, late, absent"),
        (dict(edges=[("early", "nobody", 1.0)]), "'early' to 'nobody' names no role"),
        (dict(edges=[("logits", "early", 1.0)]), "'logits' to 'early' names no role"),
        (dict(edges=[("late", "twelve", 1.0)]), "must go to a higher level, got 2 to 2"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        circuit_diagram(**CALL | change)
