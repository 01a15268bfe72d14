"""Sphinx's configuration for the site (`make site`); the pages come from tools/site.py."""

from pathlib import Path

import circuitsvis
import plotly
from docutils import nodes

from tools.pages import to_mathml
from tools.site import PAGES, REPOSITORY
from utils.session import ROOT

project = html_title = "Mechanistic Interpretability Replications"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.autosummary"]
templates_path = [str(ROOT / "docs/_templates")]  # autosummary looks from the sources

nb_execution_mode = "off"
myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3  # as GitHub names them
suppress_warnings = ["myst.header"]  # exercises stand at one level, in sections of two
html_math_renderer = "mathml"

smartquotes = False
default_role = "code"  # docstrings set names in single backticks
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
add_module_names = False

html_theme = "furo"
html_show_copyright = html_show_sphinx = html_copy_source = False
html_static_path = [
    "site.css",
    "site.js",
    str(ROOT / "tools/page/figures.css"),
    str(ROOT / "tools/page/figures.js"),
    str(Path(plotly.__file__).parent / "package_data/plotly.min.js"),
    str(Path(circuitsvis.__file__).parent / "dist/cdn/iife.js"),
]
html_css_files = ["figures.css", "site.css"]
html_js_files = [("figures.js", {"defer": ""}), ("site.js", {"defer": ""})]
html_favicon = "favicon.svg"
html_search_scorer = str(ROOT / "docs/search.js")
html_theme_options = {"source_edit_link": "set for each page", "source_view_link": "likewise"}


def link_source(app, pagename, templatename, context, doctree):
    """Each page links to the file that it was made from; a module's page to the module."""
    place = f"{pagename}{context.get('page_source_suffix', '')}"
    module = ROOT / pagename.removeprefix("api/").replace(".", "/")
    package = module / "__init__.py"
    path = PAGES.get(place, package if package.exists() else module.with_suffix(".py"))
    for kind, action in (("edit", "edit"), ("view", "blob")):
        link = f"{REPOSITORY}/{action}/main/{path.relative_to(ROOT)}"
        context[f"theme_source_{kind}_link"] = link


def visit_math(self, node):
    display = "block" if isinstance(node, nodes.math_block) else "inline"
    self.body.append(to_mathml(node.astext(), display))
    raise nodes.SkipNode


def skip_fields(app, what, name, obj, skip, options):
    """The fields of a named tuple stand in its signature, and have no words of their own."""
    return True if (obj.__doc__ or "").startswith("Alias for field number") else None


def code_where_indented(app, what, name, obj, options, lines):
    """In our docstrings an indented paragraph is code, as in Markdown."""
    starts = [
        i
        for i, line in enumerate(lines)
        if line.startswith("    ") and not lines[i - 1] and not lines[i - 2].startswith("    ")
    ]
    for i in reversed(starts):
        lines[i:i] = ["::", ""]


def setup(app):
    app.connect("autodoc-skip-member", skip_fields)
    app.connect("autodoc-process-docstring", code_where_indented)
    app.add_html_math_renderer("mathml", (visit_math, None), (visit_math, None))
    app.connect("html-page-context", link_source)
