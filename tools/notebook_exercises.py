"""The exercises inside a notebook: stub cell, check cell, folded solution.

A stub is a code cell with `raise NotImplementedError()`. The next code cell checks it
(`checks.<name>(<function>)`). The first Python block under the next `<summary>Solution</summary>`
replaces the whole stub cell.
"""

import copy
import importlib
import re
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

from utils.exercises import RIGHT, UNTRIED, Exercise

STUB = "raise NotImplementedError()"
COMPARED = "nbval-check-output"
SOLUTION = re.compile(r"<summary>\s*Solution\s*</summary>.*?```python\n(.*?)\n\s*```", re.DOTALL)


class Place(NamedTuple):
    """Where one exercise stands: index of its stub and check cells, its solution and its check."""

    stub: int
    check: int
    solution: str
    exercise: Exercise


def find_exercises(notebook: NotebookNode) -> list[Place]:
    """The exercises of a notebook, in order.

    Raises ValueError for a stub without a check or a solution before the next stub.
    """
    cells = notebook.cells
    checks = _checks_module(notebook)
    stubs = [i for i, c in enumerate(cells) if c.cell_type == "code" and STUB in c.source]
    places = []
    for stub, end in zip(stubs, [*stubs[1:], len(cells)], strict=False):
        name = re.search(r"def (\w+)", cells[stub].source)
        where = f"stub {name[1] if name else cells[stub].source!r}"
        after = range(stub + 1, end)
        check = next((i for i in after if cells[i].cell_type == "code"), None)
        called = re.search(r"^checks\.(\w+)\(", cells[check].source, re.M) if check else None
        if not called:
            raise ValueError(f"{where}: the next code cell does not call its check")
        prose = "\n".join(cells[i].source for i in after if cells[i].cell_type == "markdown")
        solution = SOLUTION.search(prose)
        if not solution:
            raise ValueError(f"{where}: no solution before the next stub")
        exercise = getattr(checks, called[1], None)
        if not isinstance(exercise, Exercise):
            raise ValueError(f"{where}: {called[0]}...) is not a check")
        places.append(Place(stub, check, solution[1], exercise))
    return places


def mark_checks(notebook: NotebookNode) -> None:
    """Tag every check cell so that nbval compares its line, which says "not attempted yet"."""
    for place in find_exercises(notebook):
        _expect(notebook.cells[place.check], f"{place.exercise}: {UNTRIED}.\n")


def solve(notebook: NotebookNode) -> NotebookNode:
    """A copy with every stub replaced by its solution and every check expected to say "right"."""
    solved = copy.deepcopy(notebook)
    for place in find_exercises(notebook):
        solved.cells[place.stub].source = place.solution
        _expect(solved.cells[place.check], f"{place.exercise}: {RIGHT}.\n")
    for cell in solved.cells:
        if cell.cell_type == "code" and "checks.progress()" in cell.source:  # now other numbers
            cell.metadata["tags"] = [t for t in cell.metadata.get("tags", []) if t != COMPARED]
    return solved


def _checks_module(notebook: NotebookNode) -> object | None:
    source = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    found = re.search(r"import (\w+_exercises) as checks", source)
    return importlib.import_module(found[1]) if found else None


def _expect(cell: NotebookNode, text: str) -> None:
    tags = cell.metadata.get("tags", [])
    cell.metadata["tags"] = tags if COMPARED in tags else [*tags, COMPARED]
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    cell.execution_count = cell.execution_count or 1  # nbval compares only cells that were run
