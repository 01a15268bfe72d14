"""The exercises inside a notebook: stub cell and folded solution.

A stub is a code cell with `raise NotImplementedError()` under the check as a decorator
(`@checks.<name>`, `def <name>`). The first Python block under the next
`<summary>Solution</summary>` replaces the whole cell; a stretch exercise has none.
"""

import copy
import importlib
import re
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

from utils.exercises.exercise import RIGHT, UNTRIED, Exercise, Stretch

STUB = "raise NotImplementedError()"
COMPARED = "nbval-check-output"
SOLUTION = re.compile(r"<summary>\s*Solution\s*</summary>.*?```python\n(.*?)\n\s*```", re.DOTALL)
OURS, YOURS = "The library's is used below.", "Yours is used below."


class Place(NamedTuple):
    """One exercise: the index of its stub cell, its solution (None: stretch), its check."""

    stub: int
    solution: str | None
    exercise: Exercise


def find_exercises(notebook: NotebookNode) -> list[Place]:
    """The exercises of a notebook, in order.

    Raises ValueError for a stub without its check or a solution before the next stub.
    """
    cells = notebook.cells
    checks = _checks_module(notebook)
    stubs = [i for i, c in enumerate(cells) if c.cell_type == "code" and STUB in c.source]
    places = []
    for stub, end in zip(stubs, [*stubs[1:], len(cells)], strict=False):
        name = re.search(r"^def (\w+)", cells[stub].source, re.M)
        where = f"stub {name[1] if name else cells[stub].source!r}"
        called = re.search(r"^@checks\.(\w+)\n", cells[stub].source, re.M)
        if not called or not name or called[1] != name[1]:
            raise ValueError(f"{where}: wants @checks.<name> above def <name>")
        exercise = getattr(checks, called[1], None)
        if not isinstance(exercise, Exercise):
            raise ValueError(f"{where}: checks.{called[1]} is not a check")
        after = cells[stub + 1 : end]
        prose = "\n".join(cell.source for cell in after if cell.cell_type == "markdown")
        solution = SOLUTION.search(prose)
        if bool(solution) == isinstance(exercise, Stretch):
            raise ValueError(f"{where}: wants a solution before the next stub, a stretch none")
        places.append(Place(stub, solution[1] if solution else None, exercise))
    return places


def mark_checks(notebook: NotebookNode) -> None:
    """Tag every stub cell so that nbval compares its line, which says "not attempted yet"."""
    for place in find_exercises(notebook):
        use = "" if isinstance(place.exercise, Stretch) else f" {OURS}"
        _expect(notebook.cells[place.stub], f"{place.exercise}: {UNTRIED}.{use}\n")


def solve(notebook: NotebookNode) -> NotebookNode:
    """A copy with every stub replaced by its solution and every check expected to say "right"."""
    solved = copy.deepcopy(notebook)
    for place in find_exercises(notebook):
        if place.solution is not None:
            solved.cells[place.stub].source = place.solution
            _expect(solved.cells[place.stub], f"{place.exercise}: {RIGHT}. {YOURS}\n")
    _do_not_compare_progress(solved)
    return solved


BREAKS = [  # what a learner may do to a cell, each in turn: after the decorator and the signature
    "return None",
    "raise RuntimeError('mine')",
    "import sys; sys.exit(1)",
    "return {name}(*[None] * 9)",
    "return [print('again') for _ in range(10**5)]",
]
CELLS = [  # and outside the function
    "model = heads = tokens = prompts = torch = None\n{stub}",
    "{stub}\n    )",  # a syntax error
    "1 / 0\n{stub}",
    "{stub}",
]
FAIL = (1, 2)


def answer_wrong(notebook: NotebookNode) -> NotebookNode:
    """A copy in which every answer is wrong, and some cells do not even run."""
    broken = copy.deepcopy(notebook)
    for i, place in enumerate(find_exercises(notebook)):
        cell = broken.cells[place.stub]
        body = BREAKS[i % len(BREAKS)].format(name=place.exercise.name)
        cell.source = CELLS[i % len(CELLS)].format(stub=cell.source.replace(STUB, body))
        fails = i % len(CELLS) in FAIL
        tags = [tag for tag in cell.metadata.get("tags", []) if tag != COMPARED]
        cell.metadata["tags"] = [*tags, "raises-exception"] if fails else tags
    _do_not_compare_progress(broken)
    return broken


def _do_not_compare_progress(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        if cell.cell_type == "code" and "checks.progress()" in cell.source:  # now other numbers
            cell.metadata["tags"] = [t for t in cell.metadata.get("tags", []) if t != COMPARED]


def _checks_module(notebook: NotebookNode) -> object | None:
    source = "\n".join(c.source for c in notebook.cells if c.cell_type == "code")
    found = re.search(r"import (\w+_exercises) as checks", source)
    return importlib.import_module(found[1]) if found else None


def _expect(cell: NotebookNode, text: str) -> None:
    tags = cell.metadata.get("tags", [])
    cell.metadata["tags"] = tags if COMPARED in tags else [*tags, COMPARED]
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)]
    cell.execution_count = cell.execution_count or 1  # nbval compares only cells that were run
