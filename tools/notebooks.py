"""Run the notebooks, refresh what is committed of them, fill in their solutions.

    python -m tools.notebooks run [NAME ...]       execute into build/<name>.ipynb and .html
    python -m tools.notebooks solve [NAME ...]     copies with every exercise solved
    python -m tools.notebooks outputs [NAME ...]   rewrite committed outputs, results and tables
    python -m tools.notebooks readme               rewrite the tables of the READMEs alone

NAME is a part of a notebook's path, such as "induction"; none means all of them.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import nbformat

from tools.notebook_run import NotebookFailed, execute
from utils.files import ROOT, write_file

BUILD = ROOT / "build"
# Interactive both in Jupyter (first form) and in the page that nbconvert makes (second form).
RUN_ENV = {"PLOTLY_RENDERER": "plotly_mimetype+notebook"}


def find_notebooks(names: list[str] | None = None) -> list[Path]:
    """The project notebooks in order, or those whose path contains one of `names`.

    Raises ValueError for a name that fits none, or when there is none at all.
    """
    every = sorted(ROOT.glob("project-*/*_notebook.ipynb"))
    shown = {path: str(path.relative_to(ROOT)) for path in every}
    if not every:
        raise ValueError(f"no notebook in {ROOT}")
    for name in names or ():
        if not any(name in text for text in shown.values()):
            raise ValueError(f"name: got {name!r}, have {', '.join(shown.values())}")
    return [path for path in every if not names or any(name in shown[path] for name in names)]


def run(paths: list[Path]) -> None:
    """Execute notebooks into build/<name>.ipynb and build/<name>.html and print the seconds."""
    for path in paths:
        started, notebook = time.monotonic(), nbformat.read(path, as_version=4)
        try:
            execute(notebook, path.parent, RUN_ENV, path.stem)
        finally:  # a run that failed is worth opening too
            write_file(BUILD / path.name, nbformat.writes(notebook))
        write_file(BUILD / f"{path.stem}.html", to_html(notebook, path.stem))
        seconds = time.monotonic() - started
        shown = (BUILD / path.stem).relative_to(ROOT)
        print(f"{path.stem}: {seconds:.0f} s; open {shown}.html or {shown}.ipynb", flush=True)


def to_html(notebook: nbformat.NotebookNode, title: str) -> str:
    """The executed notebook as one page; figures work without a network."""
    from nbconvert import HTMLExporter  # takes a second to import

    page, _ = HTMLExporter().from_notebook_node(
        notebook, resources={"metadata": {"name": title, "path": ""}}
    )
    return page


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.notebooks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=("run", "solve", "outputs", "readme"))
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--to", type=Path, default=BUILD / "solved", help="folder for `solve`")
    options = parser.parse_args(arguments)
    try:
        paths = find_notebooks(options.names)
        if options.command == "run":
            run(paths)
            return 0
        # These need torch and pandas, which take seconds to import: `run` starts at once.
        from tools import notebook_exercises, notebook_outputs

        if options.command == "outputs":
            notebook_outputs.refresh(paths)
        elif options.command == "solve":
            for path in paths:
                print(notebook_exercises.write_solved(path, options.to))
        else:
            notebook_outputs.write_readmes()
    except (NotebookFailed, ValueError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
