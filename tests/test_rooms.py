"""The rooms of the repository: what each file may import, and how long it may be."""

import ast
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = sorted(
    path.relative_to(ROOT)
    for room in ("utils", "census", "tools", "tests", "project-*")
    for path in ROOT.glob(f"{room}/**/*.py")
)
NOTEBOOKS = sorted(path.relative_to(ROOT) for path in ROOT.glob("project-*/*.ipynb"))

# Lines at most. Raising a number is a decision: is what needs it worth a reader's time?
LINES = {
    "utils/heads.py": 250,
    "utils/metrics.py": 262,
    "utils/edits.py": 346,
    "utils/ablation.py": 141,
    "utils/patching.py": 79,
    "utils/paths.py": 156,
    "utils/circuit.py": 364,
    "utils/attribution.py": 192,
    "utils/weights.py": 288,
    "utils/selection.py": 267,
    "utils/toy.py": 317,  # the analysis part ends here
    "utils/power_law.py": 107,
    "utils/prompts.py": 234,
    "utils/ioi.py": 248,
    "utils/plotting.py": 462,
    "utils/look.py": 231,
    "utils/diagram.py": 298,
    "utils/checks.py": 147,
    "utils/typed.py": 84,
    "utils/__init__.py": 5,
    "utils/widgets/controls.py": 236,
    "utils/widgets/sliders.py": 185,
    "utils/widgets/own_text.py": 195,
    "utils/widgets/own_figures.py": 85,
    "utils/exercises/exercise.py": 411,
    "utils/exercises/used.py": 77,
    "utils/exercises/diagnosis.py": 319,
    "utils/exercises/learner.py": 160,
    "utils/ledger/claims.py": 190,
    "utils/ledger/rules.py": 65,
    "utils/ledger/table.py": 80,
    "utils/ledger/results.py": 164,
    "utils/session/colab.py": 129,
    "utils/session/restart.py": 55,
    "utils/*/__init__.py": 25,
    "utils/engine/replay.py": 218,
    "utils/engine/packs.py": 227,
    "utils/engine/interrupts.py": 32,
    "utils/engine/memory.py": 70,
    "utils/engine/readout.py": 212,
    "utils/engine/direct.py": 77,
    "utils/engine/shortcuts.py": 26,
    "utils/models/load.py": 142,
    "utils/models/offline.py": 121,
    "utils/models/folder.py": 130,
    "utils/models/hub.py": 97,
    "utils/models/download.py": 136,
    "utils/**/*.py": 8339,
    "project-1-induction-heads/*_exercises.py": 775,
    "project-1-induction-heads/induction_exercises_causal.py": 425,
    "project-1-induction-heads/induction_exercises_census.py": 70,
    "project-1-induction-heads/induction_claims.py": 308,
    "project-1-induction-heads/census_claims.py": 265,
    "project-2-Indirect-Object-Identification/*_exercises.py": 1105,
    "project-2-Indirect-Object-Identification/ioi_exercises_patching.py": 710,
    "project-2-Indirect-Object-Identification/ioi_experiments.py": 375,
    "project-2-Indirect-Object-Identification/ioi_slips.py": 165,
    "project-2-Indirect-Object-Identification/*_claims.py": 402,
    "census/*.py": 994,
    "census/lean/*.py": 8,
    "tools/*.py": 2970,
    "tools/benchmark*.py": 760,
    "tests/*.py": 15047,
    "tools/site.py": 193,
    "docs/conf.py": 90,
}
ANALYSIS, ANALYSIS_LINES = list(LINES)[: list(LINES).index("utils/toy.py") + 1], 2663


def n_lines(*patterns):
    paths = [path for pattern in patterns for path in ROOT.glob(pattern)]
    assert len(paths) >= len(patterns), "a file is missing"
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


@pytest.mark.parametrize(("files", "most"), LINES.items())
def test_files_are_short(files, most):
    assert n_lines(files) <= most


def test_the_analysis_part_is_short():
    assert n_lines(*ANALYSIS) <= ANALYSIS_LINES


def test_utils_has_no_other_module():
    known = {p for pattern in LINES for p in ROOT.glob(pattern) if "**" not in pattern}
    assert [str(p) for p in MODULES if p.parts[0] == "utils" and ROOT / p not in known] == []


# Imports go one way: notebook -> its exercises and claims -> utils -> engine and models


def imported(source):
    """What a source imports, wherever in it; a name after `from` may be a module too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: import by the full name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def source(path):
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix != ".ipynb":
        return text
    cells = [c for c in json.loads(text)["cells"] if c["cell_type"] == "code"]
    return "\n".join("".join(c["source"]) for c in cells)


PACKAGES = {"utils.engine", "utils.models"}  # what the learner's modules stand on


def strays(path, text):
    """What a file imports of the repository beyond its own room and those below."""
    projects = {p.stem for p in MODULES if p.parts[0].startswith("project-")}
    below = {
        "utils": {f"utils.{p.stem}" for p in MODULES if str(p.parent) == "utils"} | PACKAGES,
        "utils/engine": {"utils.engine", "utils.typed", "utils.checks"},
        "utils/models": {"utils.models", "utils.typed"},
        "tools": {"utils", "tools"},
        "census": {"utils", "census"},
    }.get(str(path.parent), {"utils", *(p.stem for p in MODULES if p.parent == path.parent)})
    if path.name in ("typed.py", "checks.py"):
        below = {"utils.typed"} if path.name == "checks.py" else set()
    if path.suffix == ".ipynb":
        below |= {"census"}  # a reader's own training beside the rows of others
    return [
        name
        for name in imported(text)
        if name.split(".")[0] in {"utils", "census", "tools", "tests", *projects}
        and not any(f"{name}.".startswith(f"{room}.") for room in below)
    ]


@pytest.mark.parametrize("path", [p for p in MODULES + NOTEBOOKS if p.parts[0] != "tests"], ids=str)
def test_imports_go_one_way(path):
    assert strays(path, source(path)) == []


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("utils/engine/packs.py", "from utils import heads"),
        ("utils/models/load.py", "import utils.engine.packs"),
        ("utils/typed.py", "from utils.heads import Head"),
        ("utils/heads.py", "def f():\n    from tools import notebooks"),
        ("utils/heads.py", "import induction_exercises"),
        ("utils/heads.py", "from utils.ledger.results import ROOT"),
        ("utils/heads.py", "from census import grid"),
        ("census/grid.py", "import induction_claims"),
        ("tools/notebooks.py", "from tests import planted"),
        ("project-1-induction-heads/induction_exercises.py", "import ioi_exercises"),
    ],
)
def test_an_import_of_what_stands_above_is_found(path, text):
    assert len(strays(Path(path), text)) == 1
