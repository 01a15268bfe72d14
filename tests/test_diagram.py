"""The circuit diagram: what stands in it, where, and how wide; bad input is refused."""

import itertools
import re

import pytest

from utils.diagram import LOWERS, RAISES, circuit_diagram
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


@pytest.fixture(scope="module")
def fig():
    return circuit_diagram(ROLES, EDGES, levels=LEVELS, title="Circuit", note="patched")


def texts(fig):
    return [a.text for a in fig.layout.annotations if not a.showarrow]


def boxes(fig):
    """Edges (left, right, bottom, top) of each role's box, by title."""
    rects = {(s.x0, s.x1, s.y0, s.y1) for s in fig.layout.shapes if s.type == "rect"}
    named = {}
    for note in fig.layout.annotations:
        if note.text.startswith("<b>"):
            (box,) = [r for r in rects if r[0] < note.x < r[1] and r[2] < note.y < r[3]]
            named[re.search("<b>(.*?)</b>", note.text)[1]] = box
    assert len(named) == len(rects)
    return named


def arrows(fig):
    return [a for a in fig.layout.annotations if a.showarrow]


def stretches(fig):
    """Every straight piece of every arrow, as a pair of points."""
    pieces = [((a.ax, a.ay), (a.x, a.y)) for a in arrows(fig)]
    for shape in fig.layout.shapes:
        if shape.type == "path":
            numbers = [float(n) for n in re.findall(r"[\d.]+", shape.path)]
            points = list(zip(numbers[::2], numbers[1::2], strict=True))
            pieces += itertools.pairwise(points)
    return pieces


def test_every_head_stands_in_its_box_and_empty_roles_are_left_out(fig):
    named = {text.split("</b>")[0]: text for text in texts(fig) if text.startswith("<b>")}
    assert list(named) == ["<b>early", "<b>middle", "<b>twelve", "<b>late", "<b>logits"]
    for role in ("early", "middle", "twelve", "late"):
        assert re.findall(r"L\d+H\d+", named[f"<b>{role}"]) == [str(head) for head in ROLES[role]]
    assert fig.layout.title.text.startswith("Circuit<br>")
    assert "patched" in fig.layout.title.text


def test_boxes_stand_by_level_inside_the_page_and_apart(fig):
    at = boxes(fig)
    assert at["early"][3] < at["middle"][2] and at["middle"][3] < at["twelve"][2]
    assert max(at["twelve"][3], at["late"][3]) < at["logits"][2]
    assert at["twelve"][1] < at["late"][0]
    width, height = fig.layout.xaxis.range[1], fig.layout.yaxis.range[1]
    for left, right, bottom, top in at.values():
        assert 0 <= left < right <= width and 0 <= bottom < top <= height
    # a unit is a pixel, so that text fits its box
    assert fig.layout.width == width
    assert fig.layout.height - fig.layout.margin.t == pytest.approx(height)


def test_labels_colours_and_widths_tell_the_effects(fig):
    labels = [text for text in texts(fig) if not text.startswith("<b>")]
    assert labels == ["k −0.31", "q +0.50", "−1.00", "v +0.25", "+0.25"]
    effects = [effect for sender, _, effect, *_ in EDGES if sender != "absent"]
    assert [a.arrowcolor for a in arrows(fig)] == [RAISES if e > 0 else LOWERS for e in effects]
    widths = [a.arrowwidth for a in arrows(fig)]
    assert widths == pytest.approx([1 + 5 * abs(e) for e in effects])


def test_arrows_start_and_end_at_their_boxes(fig):
    at = boxes(fig)
    bent = [s.path for s in fig.layout.shapes if s.type == "path"]
    assert len(bent) == 2  # early to late and to the logits pass other rows
    for (sender, receiver, *_), arrow in zip(EDGES, arrows(fig), strict=False):
        left, right, bottom, _ = at[receiver]
        assert left < arrow.x < right and arrow.y == bottom
        if receiver == "middle" or sender in ("middle", "twelve"):
            left, right, _, top = at[sender]
            assert left < arrow.ax < right and arrow.ay == top
    left, right, _, top = at["early"]
    for path in bent:
        x, y = (float(n) for n in re.findall(r"[\d.]+", path)[:2])
        assert left < x < right and y == pytest.approx(top, abs=0.1)


def test_no_arrow_crosses_a_box(fig):
    pieces = stretches(fig)
    assert len(pieces) > len(EDGES)
    for (x0, y0), (x1, y1) in pieces:
        for left, right, bottom, top in boxes(fig).values():
            for t in (i / 50 for i in range(51)):
                x, y = x0 + t * (x1 - x0), y0 + t * (y1 - y0)
                assert not (left < x < right and bottom + 1 < y < top - 1)


def test_labels_of_parallel_arrows_stand_apart():
    edges = [("early", "late", 0.1 * i, via) for i, via in enumerate("qkv", start=1)]
    fig = circuit_diagram(ROLES, edges, levels=LEVELS, title="t")
    at = [(a.x, a.y) for a in fig.layout.annotations if a.text[:2] in ("q ", "k ", "v ")]
    assert len(at) == 3
    for (x0, y0), (x1, y1) in itertools.combinations(at, 2):
        assert abs(x0 - x1) > 60 or abs(y0 - y1) > 16


def test_crowded_levels_wrap_titles_and_heads_to_fit():
    roles = {
        f"a role with a rather long name, {i}": [Head(20, h) for h in range(12)] for i in "abcd"
    }
    fig = circuit_diagram(roles, [], levels=dict.fromkeys(roles, 0), title="t")
    rects = sorted({(s.x0, s.x1) for s in fig.layout.shapes})
    rects.remove(max(rects, key=lambda r: r[0] if r[1] - r[0] == 110 else -1))  # the logits
    assert len(rects) == 4 and all(a[1] < b[0] for a, b in itertools.pairwise(rects))
    for text in texts(fig)[:4]:
        assert len(re.findall(r"L20H\d+", text)) == 12
        longest = max(len(line) for line in re.sub("</?b>", "", text).split("<br>"))
        assert longest * 7 < 200


def test_a_circuit_without_arrows_and_effects_of_zero_can_be_drawn():
    fig = circuit_diagram(
        {"one": [Head(0, 0)]}, [("one", "logits", 0.0)], levels={"one": 5}, title="t"
    )
    assert arrows(fig)[0].arrowwidth == 1
    assert texts(fig)[:1] == ["+0.00"]


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
    call = dict(roles=ROLES, edges=EDGES, levels=LEVELS, title="t") | change
    with pytest.raises(ValueError, match=message):
        circuit_diagram(**call)
