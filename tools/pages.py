"""An executed notebook as one page that needs no network, with contents and a dark scheme."""

import re
from pathlib import Path

from jinja2 import pass_context
from latex2mathml.converter import convert
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode

TEMPLATES = Path(__file__).parent
FUNCTION = re.compile(r"(<mi>log</mi>)(?=<m[in]>)")  # without brackets a space is due
HEADING = re.compile(r'<h([12]) id="([^"]+)"[^>]*>(.*?)</h\1>', re.DOTALL)


def to_mathml(formula: str, display: str = "inline") -> str:
    """LaTeX as MathML, in signs that text fonts have too."""
    text = convert(formula, display=display)
    text = text.replace("<mi>&#x029F5;</mi>", "<mo>&#x02216;</mo>")
    return FUNCTION.sub(r'\1<mspace width="0.17em"></mspace>', text)


class PageRenderer(IPythonRenderer):
    """Markdown with formulas as MathML, and pictures from elsewhere as their words."""

    def block_math(self, body: str) -> str:
        return to_mathml(body, "block")

    def inline_math(self, body: str) -> str:
        return to_mathml(body)

    def image(self, text: str, url: str, title: str | None = None) -> str:
        return text if url.startswith("http") else super().image(text, url, title)


class PageExporter(HTMLExporter):
    """nbconvert's page in our template."""

    @pass_context
    def markdown2html(self, context: dict, source: str) -> str:
        attachments = context.get("cell", {}).get("attachments", {})
        path = context.get("resources", {}).get("metadata", {}).get("path", "")
        look = dict(escape=False, attachments=attachments, path=path)
        return MarkdownWithMath(PageRenderer(**look)).render(source)


def to_html(notebook: NotebookNode, title: str) -> str:
    """The page; its title is the notebook's first heading, or `title` if there is none."""
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    heading = re.search(r"^# (.+)$", prose, re.MULTILINE)
    css, js = map(_joined, ("css", "js"))
    name = re.sub(r"[*_`]", "", heading[1]) if heading else title
    exporter = PageExporter(template_name="page", extra_template_basedirs=[str(TEMPLATES)])
    resources = {"metadata": {"name": name, "path": ""}, "page_css": css, "page_js": js}
    page = exporter.from_notebook_node(notebook, resources=resources)[0]
    return page.replace("<!-- contents -->", contents(page), 1)


def _joined(kind: str) -> str:
    """The styles or scripts of a page."""
    files = (TEMPLATES / "page" / f"{name}.{kind}" for name in ("page", "figures"))
    return "".join(file.read_text(encoding="utf-8") for file in files)


def contents(page: str) -> str:
    """Links to the headings of a page: beside it where there is room, else folded above it."""
    items = []
    for level, anchor, inside in HEADING.findall(page):
        text = re.sub(r"<[^>]*>|¶|&#182;", "", inside).strip()
        items.append(f'<li class="h{level}"><a href="#{anchor}">{text}</a></li>')
    links = f"<ol>{''.join(items)}</ol>"
    folded = f"<details><summary>Contents</summary>{links}</details>"
    beside = f'<div class="wide">{links}</div>'
    return f'<nav class="contents" aria-label="Contents">{beside}{folded}</nav>'
