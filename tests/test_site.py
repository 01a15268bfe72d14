"""The site: every link leads somewhere, nothing is fetched from elsewhere, everything is drawn."""

import ast
import itertools
import os
import re
import subprocess
import sys
from functools import partial
from html import unescape
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urldefrag

import nbformat
import pytest
from browsers import chromium, needs_chromium
from filelock import FileLock

from tools.site import PAGES, REPOSITORY, STATUS, below_title, mended, notebook_page
from utils.ledger.results import counts, read_json
from utils.session import ROOT

pytest.importorskip("sphinx", reason="the site needs sphinx, which `make test` installs")
NOTEBOOKS = [place for place in PAGES if place.endswith(".ipynb")]
AXES = ("xy", "x2y2")  # of a figure with two panels, as plotly names them
MODULES = sorted(ROOT.glob("utils/**/*.py"))


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """The built site; a warning is an error. Tests that run at once share it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "site"
    with FileLock(f"{folder}.lock"):
        if not (folder / "index.html").exists():
            command = [sys.executable, "-m", "tools.site", str(folder)]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            assert (done.returncode, done.stdout + done.stderr) == (0, "")
    return folder


class Page(HTMLParser):
    """The ids of a page, its links, and what a browser fetches to show it."""

    def __init__(self, path):
        super().__init__()
        self.path, self.ids, self.links, self.fetched = path, set(), [], []
        self.feed(path.read_text("utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.update(attrs[key] for key in ("id", "name") if attrs.get(key))
        if tag == "a" and attrs.get("href"):
            self.links.append(attrs["href"])
        for key in ("src", "srcset", "poster", "data", *(["href"] if tag == "link" else ())):
            if attrs.get(key) and not attrs[key].startswith("data:"):
                self.fetched.append(attrs[key])


@pytest.fixture(scope="session")
def pages(site):
    return {path: Page(path) for path in site.rglob("*.html")}


def test_links_and_anchors_within_the_site_lead_somewhere(pages):
    lost = []
    for page in pages.values():
        for link in {*page.links, *page.fetched}:
            address, anchor = urldefrag(unquote(link))
            address = address.partition("?")[0]  # what is behind it only outdates caches
            if re.match("[a-z]+:", address):
                continue
            target = (page.path.parent / address).resolve() if address else page.path
            if not target.is_file():
                lost.append((page.path.name, link))
            elif anchor and target in pages and anchor not in pages[target].ids:
                lost.append((page.path.name, link))
    assert lost == [] and len(pages) > 40


def test_no_page_fetches_from_elsewhere(site, pages):
    fetched = [(path.name, link) for path, page in pages.items() for link in page.fetched]
    assert [item for item in fetched if re.match("(https?:)?//", item[1])] == []
    styles = "".join(path.read_text("utf-8") for path in site.rglob("*.css"))
    assert not re.search(r"""@import|url\(["']?(https?:)?//""", styles)
    assert not any('from "http' in path.read_text("utf-8") for path in pages)


def test_links_to_the_repository_lead_to_what_is_there(pages):
    links = {link for page in pages.values() for link in page.links}
    here = re.compile(re.escape(REPOSITORY) + r"/(?:blob|tree|edit)/main/([^#]*)")
    paths = {match[1] for match in map(here.match, links) if match}
    assert {"CITATION.cff", "README.md", "utils/heads.py"} <= paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_each_page_says_where_to_edit_it_and_notebooks_open_in_colab(site):
    sources = {place.rpartition(".")[0]: path.relative_to(ROOT) for place, path in PAGES.items()}
    sources |= {"api/utils.heads": "utils/heads.py", "api/utils.engine": "utils/engine/__init__.py"}
    colab = REPOSITORY.replace("https://github.com", "https://colab.research.google.com/github")
    for place, source in sources.items():
        html = (site / f"{place}.html").read_text("utf-8")
        assert f'href="{REPOSITORY}/edit/main/{source}"' in html, place
        if f"{place}.ipynb" in NOTEBOOKS:
            assert f'href="{colab}/blob/main/{source}"' in html, place


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_the_reference_has_every_public_name(pages, site, path):
    name = str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    if name == "utils":  # its page is the list of the others
        return
    defined = [
        node.name
        for node in ast.parse(path.read_text("utf-8")).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]
    page = pages[site / f"api/{name}.html"]
    assert [x for x in defined if f"{name}.{x}" not in page.ids] == []


def test_the_results_of_every_model_are_shown(site):
    html = unescape((site / "results.html").read_text("utf-8"))
    ledgers = [read_json(p) for p in ROOT.glob("project-*/results/*.json") if "seeds" not in p.name]
    assert len(ledgers) >= 2
    for ledger in ledgers:
        assert f"{counts(ledger['claims'])}." in html and ledger["model"] in html
        assert [c["id"] for c in ledger["claims"] if c["statement"] not in html] == []


def test_links_of_a_page_are_mended():
    text = "[a](project-1-induction-heads/) [b](CONTRIBUTING.md#speed) [c](LICENSE) [d](#x) [e](no)"
    assert mended(text, "index.md") == (
        "[a](project-1-induction-heads/index.md) [b](CONTRIBUTING.md#speed) "
        f"[c]({REPOSITORY}/blob/main/LICENSE) [d](#x) [e](no)"
    )
    above = mended("[up](../README.md) ![f](figures/a.png)", "project-1-induction-heads/index.md")
    assert above == "[up](../index.md) ![f](figures/a.png)"
    badges = "[![tests](https://x/badge.svg)](https://x/actions/y)\n\n[![Go](https://x/b.svg)](https://y)"
    assert mended(badges, "index.md") == "[Go](https://y)" and STATUS.search(badges)


def test_a_picture_with_a_dark_form_follows_the_page():
    dark = '<source media="(prefers-color-scheme: dark)" srcset="d.png">'
    html = mended(f'<picture>\n{dark}<img src="l.png" alt="x">\n</picture>', "index.md")
    light, dark = html.split('<div class="only-dark">')
    assert 'src="l.png"' in light and 'src="d.png"' in dark and "prefers-color-scheme" not in html


def test_headings_move_below_the_title_but_not_comments_of_code():
    assert below_title("# A\n```\n# b\n```\n## C") == "## A\n```\n# b\n```\n### C"


@pytest.mark.parametrize("place", NOTEBOOKS)
def test_scripts_of_a_notebook_stand_before_what_they_draw(place):
    notebook = notebook_page(nbformat.read(PAGES[place], as_version=4), place)
    cells = [c for c in notebook.cells if c.cell_type == "code"]
    html = "".join(o.get("data", {}).get("text/html", "") for c in cells for o in c.outputs)
    assert html.count("plotly.min.js") == 1 and html.count("iife.js") <= 1
    assert html.index("plotly.min.js") < html.index("plotly-graph-div")
    assert html.count("CircuitsVis.render(") == html.count('<div id="circuits-vis-')


# In a browser


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def opened(site, browser, request):
    """Opens a page at a width; at the end fails on an error, a failed request or one elsewhere."""
    trouble = []

    def open_(place, width):
        page = browser.new_page(viewport=dict(width=width, height=900))
        page.set_default_timeout(60_000)
        request.addfinalizer(page.close)
        page.on("console", lambda said: said.type == "error" and trouble.append(said.text))
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("requestfailed", lambda request: trouble.append(request.url))
        page.on("request", lambda r: r.url.startswith("http") and trouble.append(r.url))
        page.goto((site / f"{place}.html").as_uri())
        return page

    yield open_
    assert trouble == []


def fits_in_both_schemes(page, width):
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)
        shade = page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()")
        assert (int(shade.split(",")[0]) < 100) == (scheme == "dark")
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_pages_fit(opened, width):
    for place in ("index", "results", "api", "api/utils.heads", "api/utils.edits", "CONTRIBUTING"):
        fits_in_both_schemes(opened(place, width), width)


@needs_chromium
def test_the_moving_picture_follows_the_scheme(opened):
    page = opened("index", 1280)
    for scheme, hidden in (("light", "dark"), ("dark", "light")):
        page.emulate_media(color_scheme=scheme)
        picture = page.locator(f".only-{scheme} img").first
        picture.scroll_into_view_if_needed()
        page.wait_for_function("picture => picture.naturalWidth > 0", arg=picture.element_handle())
        assert picture.is_visible() and not page.locator(f".only-{hidden} img").first.is_visible()


@needs_chromium
@pytest.mark.parametrize("place", NOTEBOOKS)
def test_a_notebook_is_drawn_whole(opened, place):
    page = opened(place.removesuffix(".ipynb"), 1280)
    figures = page.locator(".plotly-graph-div").all()
    for figure in figures:
        figure.scroll_into_view_if_needed()
        figure.locator(".main-svg").first.wait_for(state="attached")
    for width in (1280, 390):  # as when a phone is turned: what is drawn is drawn again
        page.set_viewport_size(dict(width=width, height=900))
        for box in (figure.bounding_box() for figure in figures):
            assert box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] > 200
        fits_in_both_schemes(page, width)
    for view in page.locator("[id^=circuits-vis]").all():
        assert view.bounding_box()["height"] > 100
    formula = page.locator("math[display=block]:has(mfrac)").first.bounding_box()
    assert formula["height"] > 25 and formula["width"] > 10  # a fraction, not its source
    fold = page.locator("details", has_text="Hint 1").first
    inside = fold.locator("p").first
    assert not inside.is_visible()
    fold.locator("summary").click()
    assert inside.is_visible()


INDUCTION, IOI = (place.removesuffix(".ipynb") for place in NOTEBOOKS)


def drawn(page, title):
    """The figure with a title, on the screen."""
    figure = page.locator(".plotly-graph-div").and_(page.locator(f"[aria-label^='{title}']"))
    figure.scroll_into_view_if_needed()
    figure.locator(".main-svg").first.wait_for(state="attached")
    page.wait_for_timeout(500)  # what stands above it has been drawn, too
    return figure


@needs_chromium
@pytest.mark.parametrize("width", [1280, 390])
def test_a_slider_moves_its_figure_by_key(opened, width):
    page = opened(INDUCTION, width)
    figure, slider = drawn(page, "Training, step by step"), page.locator(".steps input").first
    mark, label = figure.locator(".scatterlayer .point").last, page.locator(".steps output").first
    before = mark.bounding_box()["x"], label.inner_text()
    slider.press("End")
    page.wait_for_timeout(500)
    assert mark.bounding_box()["x"] > before[0] + 50
    assert label.inner_text() == "training step: 500" != before[1]


@needs_chromium
def test_on_a_phone_panels_stand_below_each_other_and_titles_fit(opened):
    for place, title in ((IOI, "Every node above a threshold"), (IOI, "Mary wins")):
        page = opened(place, 390)
        figure = drawn(page, title)
        upper, lower = (figure.locator(f".{name} .nsewdrag").bounding_box() for name in AXES)
        assert upper["y"] + upper["height"] < lower["y"] and upper["width"] == lower["width"] > 200
        text = figure.locator(".gtitle").bounding_box()
        assert text["x"] + text["width"] <= 390 and text["y"] + text["height"] < upper["y"]
        assert figure.locator(".modebar-btn").count() == 0


@needs_chromium
def test_on_a_phone_points_are_named_in_full_maps_of_tokens_are_square_and_ticks_do_not_meet(
    opened,
):
    figure = drawn(opened(IOI, 390), "Attribution patching against")
    inside = figure.locator(".nsewdrag").bounding_box()
    names = [name.bounding_box() for name in figure.locator(".textpoint").all()]
    assert len(names) > 3
    for box in names:
        assert inside["x"] <= box["x"]
        assert box["x"] + box["width"] <= inside["x"] + inside["width"]
    figure = drawn(opened(INDUCTION, 390), "OV circuit of")
    inside = figure.locator(".nsewdrag").bounding_box()
    assert abs(inside["width"] - inside["height"]) < 4
    ticks = [tick.bounding_box() for tick in figure.locator(".xtick text").all()]
    assert len(ticks) > 3
    assert all(a["x"] + a["width"] + 4 < b["x"] for a, b in itertools.pairwise(ticks))


@needs_chromium
def test_on_a_phone_rows_of_a_wide_table_are_cards_whose_cells_have_names(opened):
    page = opened(INDUCTION.rpartition("/")[0] + "/index", 1280)
    assert page.locator("table.cards").count() == 0
    page.set_viewport_size(dict(width=390, height=900))
    cells = page.locator("table.cards tbody tr").first.locator("td")
    cells.first.wait_for()
    names = ["verdict", "claim", "what is measured", "published"]
    names += ["ours\u00a0±\u00a0standard error (n)"]
    assert [cell.get_attribute("data-label") for cell in cells.all()] == names
    boxes = [cell.bounding_box() for cell in cells.all()]
    assert all(a["y"] + a["height"] <= b["y"] for a, b in itertools.pairwise(boxes))
    assert max(box["x"] + box["width"] for box in boxes) <= 390
    page.set_viewport_size(dict(width=1280, height=900))
    page.locator("table.cards").first.wait_for(state="detached")


@needs_chromium
def test_a_jump_ends_at_its_place_though_figures_are_drawn_on_the_way(opened):
    page = opened(IOI, 390)
    page.evaluate("location.hash = '#the-circuit-drawn'")
    page.wait_for_timeout(2000)
    assert 0 < page.locator("#the-circuit-drawn").bounding_box()["y"] < 200


@needs_chromium
def test_figures_follow_the_scheme_of_the_page(opened):
    page = opened(IOI, 1280)
    figure = drawn(page, "Logit difference by frame")
    dark = (
        "figure => parseInt(getComputedStyle(figure.querySelector('.gtitle')).fill.slice(4)) < 99"
    )
    assert figure.evaluate(dark) and figure.locator("rect.bg").first.count() == 1
    page.evaluate("document.body.dataset.theme = 'dark'")
    page.wait_for_function(f"!({dark})(document.querySelector('.js-plotly-plot'))")


@needs_chromium
def test_contents_are_beside_the_text_and_code_fits(opened):
    page = opened(INDUCTION, 1280)
    assert page.locator(".toc-tree").is_visible() and page.locator(".toc-tree a").count() > 20
    wide = "[...document.querySelectorAll('.cell pre')].filter(x => x.scrollWidth > x.clientWidth)"
    wide += ".filter(x => x.checkVisibility({contentVisibilityAuto: true}))"  # not what is folded
    assert page.evaluate(f"{wide}.length") == 0
    page.set_viewport_size(dict(width=390, height=900))
    assert page.evaluate(f"{wide}.length") > 0
    page.reload()
    assert page.evaluate(f"{wide}.every(x => x.tabIndex === 0)")


@pytest.mark.parametrize("place", NOTEBOOKS)
def test_a_figure_that_answers_says_that_it_needs_a_kernel(site, place):
    html = (site / place).with_suffix(".html").read_text("utf-8")
    assert html.count('class="needs-kernel"') == 1 and "make lab" in html


@pytest.fixture
def served(site):
    """The site's address: search reads pages, which a browser allows of a server alone."""
    handler = partial(SimpleHTTPRequestHandler, directory=site)
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@needs_chromium
def test_search_finds_a_function(served, browser):
    page = browser.new_page()
    page.goto(f"{served}/index.html")
    page.fill("input[name=q]", "prefix_matching_score")
    page.keyboard.press("Enter")
    page.locator("#search-results a", has_text="prefix_matching_score").first.wait_for()
    page.goto(f"{served}/search.html?q=induction+head")
    page.locator("#search-results a", has_text="Induction heads: how").first.wait_for()
    assert "Induction heads" in page.locator("#search-results a").first.inner_text()
    page.close()
