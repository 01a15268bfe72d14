"""Pages and drawings in a real browser: drawn, inside the page, without errors or requests."""

from xml.etree import ElementTree

import pytest
from browsers import chromium, needs_chromium
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.drawings import CIRCUITS
from tools.pages import to_html
from utils import plotting
from utils.diagram import circuit_diagram
from utils.heads import Head
from utils.ledger.results import read_json
from utils.ledger.table import LedgerTable, Rule
from utils.session import ROOT

pytestmark = needs_chromium
FOLD = "<details><summary>Hint</summary>\n\nHidden\n\n</details>"
PROSE = f"# A page\n\n$$\\frac{{\\sum_i \\lambda_i}}{{n}}$$\n\n## A part\n\n{FOLD}"
LOOKS = [(width, scheme) for width in (1280, 390) for scheme in ("light", "dark")]


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(browser, request):
    """Opens a file at a width and scheme; at the end fails on an error or a request elsewhere."""
    trouble = []

    def open_(path, width, scheme):
        page = browser.new_page(viewport=dict(width=width, height=900), color_scheme=scheme)
        request.addfinalizer(page.close)
        page.on("console", lambda said: said.type == "error" and trouble.append(said.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("request", lambda r: r.url.startswith("http") and trouble.append(r.url))
        page.goto(path.as_uri())
        return page

    yield open_
    assert trouble == []


@pytest.fixture(scope="module")
def page_file(tmp_path_factory):
    """A page with a formula, figures of each kind, a ledger and a wide table."""
    claims = read_json(ROOT / "project-1-induction-heads/results/smollm2-135m.json")["claims"]
    ledger = LedgerTable(claims, [Rule("paper", "rule")] * len(claims))
    words = dict(title="A title that is rather long for a phone", x_label="x", y_label="y")
    figures = [
        plotting.lines(range(9), {"L0H1": range(9), "L1H2": range(9)}, **words),
        plotting.heatmap({"a": [[0, 1], [2, 3]], "b": [[0, 1], [2, 3]]}, **words),
        plotting.bars("abc", {"one": [1, 2, 3], "two": [3, 2, 1]}, **words),
        circuit_diagram({"a": [Head(0, 0)]}, [("a", "logits", 1)], levels={"a": 0}, title="t"),
    ]
    shown = [f.to_html(full_html=False, include_plotlyjs=i == 0) for i, f in enumerate(figures)]
    table = f"<table><tr>{'<td>a wide cell</td>' * 30}</tr></table>"
    outputs = [
        new_output("display_data", {"text/html": html})
        for html in (*shown, ledger._repr_html_(), table)
    ]
    cells = [new_markdown_cell(PROSE), new_code_cell("x = " + "1 + " * 90 + "1", outputs=outputs)]
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(to_html(new_notebook(cells=cells), "page"), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_a_page_fits_and_draws_everything(opened, page_file, width, scheme):
    page = opened(page_file, width, scheme)
    page.wait_for_function("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 4")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    areas = page.locator(".jp-OutputArea-output", has=page.locator(".js-plotly-plot")).all()
    assert len(areas) == 4
    for box in (area.bounding_box() for area in areas):  # the diagram scrolls inside its own
        assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 200
    formula = page.locator("math[display=block]").bounding_box()
    assert formula["height"] > 25 and formula["width"] > 10  # a fraction, not its source
    shade = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()")
    assert (int(shade.split(",")[0]) < 100) == (scheme == "dark")
    figure = page.locator("b", has_text="(n = 16)").bounding_box()
    assert figure["height"] < 30 and figure["x"] + figure["width"] <= width  # one line


def test_folds_open_and_contents_lead_to_their_part(opened, page_file):
    page = opened(page_file, 390, "light")
    hidden = page.get_by_text("Hidden")
    assert not hidden.is_visible()
    page.click("summary:text('Hint')")
    assert hidden.is_visible()
    page.click("summary:text('Contents')")
    page.click("nav details a:text('A part')")
    assert page.evaluate("location.hash") == "#A-part"
    page.wait_for_selector("nav details:not([open])")
    page.evaluate("scrollTo(0, document.body.scrollHeight)")
    assert page.get_by_text("Contents").bounding_box()["y"] < 50  # in reach from everywhere


@pytest.mark.parametrize("name", CIRCUITS)
@pytest.mark.parametrize(("width", "scheme"), LOOKS)
def test_texts_of_a_drawing_never_meet_and_stay_inside(opened, name, width, scheme):
    dark = "_dark" if scheme == "dark" else ""
    page = opened(ROOT / f"{name}{dark}.svg", width, scheme)
    boxes = page.evaluate(
        "[...document.querySelectorAll('text')].map(t => t.getBBox()).map(b => "
        "[b.x, b.y, b.x + b.width, b.y + b.height])"
    )
    size = ElementTree.fromstring((ROOT / f"{name}{dark}.svg").read_text("utf-8")).get("viewBox")
    _, _, right, bottom = map(float, size.split())
    upright = [box for box in boxes if box[0] > 0]  # the label that is turned has its own axes
    assert all(box[2] <= right and box[3] <= bottom for box in upright)
    for i, a in enumerate(upright):
        for b in upright[i + 1 :]:
            assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] + 4 or b[3] <= a[1] + 4
