"""The page of a notebook asks no network, and has a title, contents, formulas, both schemes."""

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tools.notebooks import find_notebooks
from tools.pages import contents, to_html, to_mathml
from utils.session import ROOT

BADGE = "[![Open In Colab](https://colab.example/badge.svg)](https://colab.example/x)"
PROSE = f"{BADGE}\n\n# How *heads* work\n\nThe loss is $-\\log p$, and\n\n$$\\frac{{a}}{{b}}$$"


def page(*prose):
    figure = new_output("display_data", {"image/svg+xml": "<svg></svg>", "text/plain": "x"})
    cells = [*map(new_markdown_cell, prose), new_code_cell("1", outputs=[figure])]
    return to_html(new_notebook(cells=cells), "the file")


def requests(html):
    """What a browser would fetch of the page; links wait for a click."""
    html = re.sub(r"<a [^>]*>", "", html)
    return re.findall(r'(?:src|href)="(?!data:|#)[^"]+"|url\("?http[^)]*|import\(?[\'"]http', html)


def test_a_page_asks_no_network_and_shows_its_formulas():
    html = page(PROSE)
    assert requests(html) == []
    assert re.search(r'<math display="block"[^>]*><mrow><mfrac>', html)
    assert html.count("<math") == 2 and "$" not in re.sub(r"(?s)<(style|script).*?</\1>", "", html)
    assert 'href="https://colab.example/x"' in html and "Open In Colab" in html


def test_a_fold_holds_its_text():
    html = page("<details><summary>Hint</summary>\n\nA *hint*.\n\n</details>\n\nAfter.")
    assert re.search(
        r"<details><summary>Hint</summary>\s*<p>A <em>hint</em>\.</p>\s*</details>", html
    )


def test_a_page_has_a_title_contents_and_a_dark_scheme():
    html = page(PROSE, "## First part\n\n### Not listed", "## Second part")
    assert "<title>How heads work</title>" in html
    listed = re.findall(r'<li class="(h\d)"><a href="#([^"]+)">([^<]+)</a>', contents(html))
    assert list(dict.fromkeys(listed)) == [
        ("h1", "How-heads-work", "How heads work"),
        ("h2", "First-part", "First part"),
        ("h2", "Second-part", "Second part"),
    ]
    assert contents(html) in html
    assert '<style media="(prefers-color-scheme: dark)"' in html
    assert "<title>the file</title>" in page("No heading")


@pytest.mark.parametrize("path", find_notebooks(), ids=lambda path: str(path.relative_to(ROOT)))
def test_every_formula_of_the_notebooks_becomes_mathml(path):
    notebook = nbformat.read(path, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.cell_type == "markdown"]
    html = to_html(notebook, path.stem)
    assert requests(html) == [] and "<math" in html
    prose = re.sub(r"(?s)<(style|script|pre|code)\b.*?</\1>", "", html)
    assert not re.search(r"\$|\\[a-z]+\{", prose)


def test_a_formula_has_signs_that_fonts_have_and_a_space_behind_log():
    assert "<mi>C</mi><mo>&#x02216;</mo><mi>K</mi>" in to_mathml(r"C \setminus K")
    assert re.search(r"log</mi><mspace [^>]*></mspace><mi>p", to_mathml(r"\log p(x)"))
    assert "mspace" not in to_mathml(r"\log(x)")
