"""Open JupyterLab on copies of the notebooks, which are the learner's.

    python -m tools.lab [OPTION ...]    options go to JupyterLab, such as --no-browser

The copies lie in `my/`, which git ignores and nothing overwrites.
"""

import hashlib
import json
import os
import sys
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tools.notebooks import find_notebooks
from utils.ledger.results import write_file
from utils.session import ROOT

MY = ROOT / "my"
# Its overrides.json: no question about news at the first start, no search for newer versions, and
# the scheme of the system.
SETTINGS = ROOT / "tools" / "jupyterlab"
WORKSPACE = "default-37a8.jupyterlab-workspace"  # as JupyterLab names the file of "default"
CONTENTS = "@jupyterlab/toc:plugin"  # its pane of headings
ORIGIN = "copied_from"  # in a copy's metadata: the version that it was made from


def copy_notebooks() -> list[Path]:
    """Copy each notebook, without outputs, where no copy is yet; says what it did.

    Returns the copies in the order of the learning path.
    """
    copies = []
    for source in find_notebooks():
        copy, notebook = MY / source.name, nbformat.read(source, as_version=4)
        version = _version(notebook)
        copies.append(copy)
        shown = copy.relative_to(ROOT)
        if not copy.exists():
            for cell in notebook.cells:
                if cell.cell_type == "code":
                    cell.outputs, cell.execution_count = [], None
            notebook.metadata[ORIGIN] = version
            write_file(copy, nbformat.writes(notebook))
            print(f"{shown}: a copy for you.")
        elif _origin(copy) == version:
            print(f"{shown}: yours, as you left it.")
        else:
            print(
                f"{shown}: yours, as you left it. {source.relative_to(ROOT)} has changed since: "
                "for a copy of the newer one, give yours another name and run this again."
            )
    return copies


def _version(notebook: NotebookNode) -> str:
    """A name for what a notebook's cells say, whatever their outputs."""
    text = json.dumps([(cell.cell_type, cell.source) for cell in notebook.cells])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _origin(copy: Path) -> str | None:
    """The version that a copy was made from; None if that cannot be told any more."""
    try:
        return json.loads(copy.read_text(encoding="utf-8"))["metadata"].get(ORIGIN)
    except (KeyError, ValueError):  # a file that its owner has broken is theirs too
        return None


def open_contents(folder: Path) -> None:
    """At the first start the notebook's contents stand beside it, and not the list of files."""
    file = folder / WORKSPACE
    if not file.exists():
        beside = {"collapsed": False, "visible": True, "current": CONTENTS}
        beside["widgets"] = ["filebrowser", "running-sessions", CONTENTS]
        layout = {"left": beside, "relativeSizes": [0.22, 0.78, 0]}
        data = {"layout-restorer:data": layout}
        write_file(file, json.dumps({"data": data, "metadata": {"id": "default"}}))


def main(options: list[str]) -> None:
    """Copy what is missing, then become JupyterLab, so that Ctrl-C reaches it alone."""
    first, *_ = copies = copy_notebooks()
    names = [str(copy.relative_to(ROOT)) for copy in copies]
    print(f"Learning path: {', then '.join(names)}. Ctrl-C ends JupyterLab.", flush=True)
    os.chdir(ROOT)
    os.environ.setdefault("PYTHONSTARTUP", str(ROOT / "tools/kernel_start.py"))
    open_contents(layout := MY / ".layout")
    # in this way the address that is printed leads there too
    command = ["-m", "jupyterlab"]
    command += [f"--LabApp.default_url=/lab/tree/{first.relative_to(ROOT).as_posix()}"]
    command += [f"--LabApp.app_settings_dir={SETTINGS}", f"--LabApp.workspaces_dir={layout}"]
    command += options
    if getattr(os, "geteuid", lambda: None)() == 0:  # as in a container, where Jupyter asks for it
        command.append("--allow-root")
    os.execv(sys.executable, [sys.executable, *command])


if __name__ == "__main__":
    main(sys.argv[1:])
