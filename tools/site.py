"""The static site, from what is committed: no notebook is run, and no page asks another host.

    python -m tools.site [FOLDER]       into build/site without one

Sphinx reads its sources from one folder, so the pages are first written to `<FOLDER>-pages`: the
Markdown files and notebooks of the repository, with links between them as links between pages.
"""

import json
import re
import shutil
import sys
from html import escape
from importlib import import_module
from os.path import relpath
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.notebook_outputs import PLOTLY, SEEDS_FILE
from tools.notebooks import find_notebooks
from tools.results import heads_table
from utils.ledger.results import read_json, write_file
from utils.ledger.table import LedgerTable, Rule
from utils.session import ROOT

DOCS = ROOT / "docs"
REPOSITORY = re.search(r'Repository = "(.+)"', (ROOT / "pyproject.toml").read_text("utf-8"))[1]
# What is shown of the repository, by the place of its page.
PAGES = {
    "index.md": ROOT / "README.md",
    "CONTRIBUTING.md": ROOT / "CONTRIBUTING.md",
    **{path.name: path for path in DOCS.glob("*.md")},
    **{f"{p.parent.name}/index.md": p for p in sorted(ROOT.glob("project-*/README.md"))},
    **{str(path.relative_to(ROOT)): path for path in find_notebooks()},
}
BADGE = re.compile(r"\[!\[([^\]]*)\]\(http[^)]*\)\]")  # a picture from elsewhere, in a link
STATUS = re.compile(r"\[!\[[^\]]*\]\([^)]*\)\]\([^)]*/actions/[^)]*\)\n*")  # of today, not a page's
LINK = re.compile(r'((?<!!)\[[^\]]*\]\(|href=")([^)#"\s:]+)')
COLAB = f"{REPOSITORY.replace('github.com', 'colab.research.google.com/github')}/blob/main"
# What only a kernel can do; sliders move in a page too.
WIDGET = re.compile(r"^controls\.your_", re.MULTILINE)
NEEDS_KERNEL = (
    '<p class="needs-kernel">This needs a running notebook: <a href="{}">open it in Colab</a> '
    "or with <code>make lab</code>. Below is what it shows first.</p>\n"
)
PICTURE = re.compile(r"<picture>.*?</picture>", re.DOTALL)
DARK = re.compile(r'\s*<source media="\(prefers-color-scheme: dark\)" srcset="([^"]+)">')
# circuitsvis' view: an empty place that is never closed, and a script from a CDN.
VIEW = re.compile(r'"/>\s*<script[^>]*>\s*import .*? from "http[^;]*;\s*render\(([^,]*,\s*)')
LOCAL = r'"></div><script type="module">CircuitsVis.render(\1CircuitsVis.'


def write_pages(folder: Path) -> None:
    """Write every page's source, and the figures that they show."""
    shutil.rmtree(folder, ignore_errors=True)
    for place, path in PAGES.items():
        if path.suffix == ".ipynb":
            text = nbformat.writes(notebook_page(nbformat.read(path, as_version=4), place))
        else:
            text = mended(path.read_text("utf-8"), place)
        write_file(folder / place, text)
    write_file(folder / "results.md", (folder / "results.md").read_text("utf-8") + results())
    with (folder / "index.md").open("a") as index:
        index.write((DOCS / "_templates/contents.md").read_text("utf-8"))
    copy_figures(folder)


def copy_figures(folder: Path) -> None:
    for figures in ROOT.glob("project-*/figures"):
        shutil.copytree(figures, folder / figures.relative_to(ROOT), dirs_exist_ok=True)


def mended(text: str, place: str) -> str:
    """Markdown for the page at `place`: badges as words, relative links as on the site.

    A link to what is no page leads to the repository; a picture with a dark form follows the
    page's scheme, which need not be the system's.
    """
    home, path = Path(place).parent, PAGES[place]
    places = {page: name for name, page in PAGES.items()}

    def link(match: re.Match) -> str:
        start, target = match.groups()
        file = (path.parent / target).resolve()
        if not file.exists():
            return match[0]
        page = places.get(file) or places.get(file / "README.md")
        if page is None:
            kind = "tree" if file.is_dir() else "blob"
            return f"{start}{REPOSITORY}/{kind}/main/{file.relative_to(ROOT)}"
        return start + relpath(page, home)

    return PICTURE.sub(_both_schemes, LINK.sub(link, BADGE.sub(r"[\1]", STATUS.sub("", text))))


def _both_schemes(match: re.Match) -> str:
    picture = match[0].replace("<img ", '<img loading="lazy" ')
    dark, light = DARK.search(picture), DARK.sub("", picture)
    if dark is None:
        return light
    other = re.sub(r'\bsrc="[^"]+"', f'src="{dark[1]}"', light)
    return f'<div class="only-light">\n{light}\n</div>\n<div class="only-dark">\n{other}\n</div>'


def notebook_page(notebook: NotebookNode, place: str) -> NotebookNode:
    """The notebook with one title, and figures that the scripts of the site draw."""
    static, loaded = relpath("_static", Path(place).parent), set()

    def drawn_by(script: str, html: str) -> str:
        """Each script stands once in a page, before the first figure that it draws."""
        tag = "" if script in loaded else f'<script defer src="{static}/{script}"></script>\n'
        loaded.add(script)
        return tag + html

    for i, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            cell.source = mended(below_title(cell.source) if i else cell.source, place)
            continue
        shown = [output for output in cell.outputs if "data" in output]
        views = [o for o in shown if "circuits-vis" in o.data.get("text/html", "")]
        for output in views:
            output.data = {
                "text/html": drawn_by("iife.js", VIEW.sub(LOCAL, output.data["text/html"]))
            }
        for output in shown:
            if drawing := output.data.get("image/svg+xml"):  # in an <img> its words are not read
                output.data = {"text/html": drawing}
        figures = [output for output in shown if PLOTLY in output.data]
        for output in figures:
            html = drawn_by("plotly.min.js", _figure(output))
            if WIDGET.search(cell.source):
                html = NEEDS_KERNEL.format(f"{COLAB}/{place}") + html
            output.data = {"text/html": html}
        if views:  # a figure beside a view is its still picture, for where scripts are stripped
            cell.outputs = [output for output in cell.outputs if output not in figures]
    return notebook


def below_title(text: str) -> str:
    """Markdown with each heading one level down: a page has one title."""
    parts = re.split(r"(^```.*?^```)", text, flags=re.DOTALL | re.MULTILINE)
    parts[::2] = [re.sub(r"^#+ ", r"#\g<0>", part, flags=re.MULTILINE) for part in parts[::2]]
    return "".join(parts)


def _figure(output: NotebookNode) -> str:
    """A place of the figure's height, named by its words; docs/site.js draws what follows it."""
    figure, words = output.data[PLOTLY], escape(output.metadata["image/png"]["alt"])
    height = figure["layout"].get("height", 450)
    data = json.dumps(figure).replace("<", "\\u003c")  # may hold the end of a script
    return (
        f'<div class="plotly-graph-div" role="img" aria-label="{words}" style="height:{height}px">'
        f'</div>\n<script type="application/json">{data}</script>'
    )


def results() -> str:
    """Every claim and its verdict, by project and model, as Markdown."""
    parts = []
    for folder in sorted(ROOT.glob("project-*")):
        title = (folder / "README.md").read_text("utf-8").partition("\n")[0]
        claims = {}
        for module in folder.glob("*_claims.py"):
            claims |= import_module(module.stem).CLAIMS
        parts.append(below_title(title))
        for path in sorted(folder.glob("results/*.json")):
            if path.name != SEEDS_FILE:
                ledger = read_json(path)
                rules = [Rule(c["source"], claims[c["id"]].rule) for c in ledger["claims"]]
                name = f"{folder.name[:9]}-{path.stem}"
                table = LedgerTable(ledger["claims"], rules, name)._repr_html_()
                parts += [f"### {ledger['model']}", table, heads_table(ledger)]
    return "\n\n".join(parts)


def main(arguments: list[str]) -> int:
    """The command line; returns Sphinx's exit status."""
    from sphinx.cmd.build import main as sphinx_build

    folder = Path(arguments[0]) if arguments else ROOT / "build/site"
    sys.path += [str(project) for project in ROOT.glob("project-*")]  # their claims
    pages = folder.with_name(f"{folder.name}-pages")
    write_pages(pages)
    shutil.rmtree(folder, ignore_errors=True)
    copy_figures(folder)  # those in HTML, which Sphinx does not look into
    quiet = ["-q", "-E", "-d", str(folder.with_name(f"{folder.name}-cache"))]
    return sphinx_build([*quiet, "-W", "--keep-going", "-c", str(DOCS), str(pages), str(folder)])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
