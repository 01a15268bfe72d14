"""The drawings of the circuits: committed as the code draws them, readable on either page."""

import itertools
from xml.etree import ElementTree

import pytest
from contrast import contrast

from tools import drawings
from utils.diagram import FAMILIES, INK, LOWERS, RAISES
from utils.session import ROOT

NAMES = [(name, dark) for name in drawings.CIRCUITS for dark in (False, True)]


@pytest.mark.parametrize(("name", "dark"), NAMES)
def test_committed_drawings_are_what_the_code_draws(name, dark):
    text = drawings.svg(drawings.CIRCUITS[name], dark)
    assert (ROOT / f"{name}{'_dark' if dark else ''}.svg").read_text(encoding="utf-8") == text


@pytest.mark.parametrize(("name", "dark"), NAMES)
def test_a_drawing_holds_its_words_inside_its_page_and_says_what_it_shows(name, dark):
    circuit = drawings.CIRCUITS[name]
    root = ElementTree.fromstring(drawings.svg(circuit, dark))
    texts = ["".join(part.itertext()) for part in root]
    for expected in (*itertools.chain(*circuit.words), circuit.answer, circuit.title):
        assert expected in texts
    for step in circuit.steps:
        assert step.text in texts and step.text in root.find("{*}desc").text
    _, _, width, height = map(float, root.get("viewBox").split())
    for part in root:
        x, y = float(part.get("x", 0)), float(part.get("y", 0))
        assert 0 <= x <= x + float(part.get("width", 0)) <= width and 0 <= y <= height


@pytest.mark.parametrize("look", [drawings.LIGHT, drawings.DARK])
def test_colours_stand_out_from_the_page_and_text_more(look):
    of = drawings.ON_DARK if look is drawings.DARK else {n: f.colour for n, f in FAMILIES.items()}
    assert all(contrast(colour, look["page"]) >= 3 for colour in of.values())
    assert contrast(look["faint"], look["page"]) >= 4.5
    assert contrast(look["ink"], look["box"]) >= 7


def test_every_family_has_a_colour_of_its_own_and_no_arrow_has_it():
    colours = [*(family.colour for family in FAMILIES.values()), INK, RAISES, LOWERS]
    assert len({*colours}) == len(colours)
    assert all(contrast(colour, "#ffffff") >= 3 for colour in colours)
    roles = list(itertools.chain(*(family.roles for family in FAMILIES.values())))
    assert len({*roles}) == len(roles)
