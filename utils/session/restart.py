"""After a restart: a name that is not there yet is told with the cell that makes it."""

import json
import re
import symtable
import sys
from pathlib import Path

from utils.session import ROOT

FIRST = ""
HOW = (
    "After a restart run all cells above first "
    "(Run > Run All Above Selected Cell; in Colab Runtime > Run before)."
)


def explain_missing_names(notebook: Path) -> None:
    """In a kernel, let errors about missing names and modules of the notebook say what to run."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None:
        return

    def explain(shell, kind, error, trace, tb_offset=None) -> None:
        of_project = any(ROOT.glob(f"project-*/{error.name}.py"))  # the first cell makes it known
        if place := where_made(notebook).get(FIRST if of_project else error.name):
            error.args = (f"{error}. {place} makes it. {HOW}",)
            error.msg = error.args[0]  # what an ImportError shows
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)

    shell.set_custom_exc((NameError, ModuleNotFoundError), explain)


def where_made(notebook: Path) -> dict[str, str]:
    """For each name that code cells make, the first cell that does: its number and heading.

    `FIRST` stands for the first code cell of all.
    """
    found, heading, n = {}, "", 0
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            heading = (re.findall(r"^#{1,6}\s+(.+)$", source, re.MULTILINE) or [heading])[-1]
        elif cell["cell_type"] == "code":
            n += 1
            place = f'Code cell {n} (under "{heading}")'
            found.setdefault(FIRST, place)
            try:
                symbols = symtable.symtable(source, "cell", "exec").get_symbols()
            except SyntaxError:  # a learner's
                continue
            made = [s for s in symbols if s.is_assigned() or s.is_imported() or s.is_namespace()]
            for symbol in made:
                found.setdefault(symbol.get_name(), place)
    return found
