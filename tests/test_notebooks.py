"""The notebooks as a reader meets them: they run, solved or not, on any model, anywhere."""

import base64
import os
import re
import resource
import statistics
import struct
import subprocess
import symtable
import sys
from copy import deepcopy
from importlib import import_module

import nbformat
import pytest

from tools.notebook_exercises import COMPARED, answer_wrong, find_exercises, solve
from tools.notebook_outputs import MAX_BYTES, readmes, with_tables
from tools.notebook_run import execute
from tools.results import compare
from utils.circuit import nodes
from utils.exercises.exercise import RIGHT, WRONG, Stretch
from utils.heads import Head
from utils.ledger.results import HOLDS, read_json, write_file
from utils.session import ROOT

MODEL = "smollm2-135m"
NOTEBOOKS = sorted(ROOT.glob("project-*/*_notebook.ipynb"))
every_readme = pytest.mark.parametrize(
    "readme", readmes(), ids=lambda path: str(path.relative_to(ROOT))
)

STUDIED = {"ioi.greedy_circuit", "ioi.worst_set"}  # from `make study`, not made of every model


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def notebook(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_env(model, results):
    env = {"MECH_INTERP_MODEL": str(model), "MECH_INTERP_RESULTS": str(results)}
    return env | {"PLOTLY_RENDERER": "plotly_mimetype"}  # no browser needed


def run_nbval(path, results, capfd):
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env"]
    env = run_env(MODEL, results)
    command += ["--nbval-cell-timeout=900", "-p", "no:cacheprovider", str(path)]
    with capfd.disabled():  # minutes: show that something happens
        print(f"\n{path.relative_to(ROOT)}, cell by cell:", file=sys.stderr)
        run = subprocess.run(command, cwd=ROOT, env=os.environ | env, stdout=sys.stderr)
    assert run.returncode == 0


def test_there_is_a_notebook():
    assert NOTEBOOKS  # else every test below would be skipped


def test_shipped_notebook_gives_its_committed_results(path, tmp_path, capfd):
    run_nbval(path, tmp_path, capfd)
    fresh = read_json(tmp_path / path.parent.name / f"{MODEL}.json")
    committed = read_json(path.parent / "results" / f"{MODEL}.json")
    assert compare(fresh, committed) == []


@pytest.mark.nightly
@pytest.mark.parametrize("answers", [solve, answer_wrong])
def test_answers_right_or_wrong_give_the_same_results(path, notebook, answers, tmp_path, capfd):
    # Below the repository, so that the notebook finds it, as a reader's copy would.
    answered = ROOT / "build" / answers.__name__ / path.name
    write_file(answered, nbformat.writes(answers(notebook)))
    run_nbval(answered, tmp_path, capfd)
    fresh = read_json(tmp_path / path.parent.name / f"{MODEL}.json")
    committed = read_json(path.parent / "results" / f"{MODEL}.json")
    assert compare(fresh, committed) == []


SHORT_TRAINING = """import census.training
import utils.toy
long_toy, long_setting = utils.toy.train_toy, census.training.trained
utils.toy.train_toy = lambda *args, **kwargs: long_toy(*args, **kwargs | {"n_steps": 40})
census.training.trained = lambda setting: long_setting(setting._replace(n_steps=20))"""


def twice(notebook):
    """A copy with every cell followed by itself, as a reader may run it."""
    copy = deepcopy(notebook)
    copy.cells = [each for cell in copy.cells for each in (cell, deepcopy(cell))]
    for i, cell in enumerate(copy.cells):
        cell.id = f"cell{i}"
    return copy


def run_on_random_weights(notebook, path, results, folder):
    """Run on a small random model, toys trained briefly; what the ledger says of each claim."""
    after = 1 + max(i for i, cell in enumerate(notebook.cells) if "\nset_up(" in cell.source)
    notebook.cells.insert(after, nbformat.v4.new_code_cell(SHORT_TRAINING))
    execute(notebook, path.parent, run_env(folder, results), f"{path.stem}, {results.name}")
    notebook.cells.pop(after)
    (written,) = results.glob("*/*.json")
    return {claim["id"]: claim for claim in read_json(written)["claims"]}


def test_on_random_weights_answers_make_no_difference_and_no_claim_holds(
    path, notebook, tmp_path, capfd, gpt2_stand_in
):
    """Random weights that go by GPT-2 small's label: what is asked of that model alone is run."""
    ways = {"as shipped": (notebook, 1), "wrong": (answer_wrong(notebook), 1)}
    ways["solved, each cell twice"] = (twice(solve(notebook)), 2)
    ledgers = {}
    for name, (answered, times) in ways.items():
        with capfd.disabled():
            print()
            results = tmp_path / name
            ledgers[name] = run_on_random_weights(answered, path, results, gpt2_stand_in)
        for place in find_exercises(notebook):
            for stub in answered.cells[times * place.stub : times * (place.stub + 1)]:
                said = "".join(output.get("text", "") for output in stub.outputs)
                right = name.startswith("solved") and place.solution is not None
                assert (f"{place.exercise}: {RIGHT}." in said) == right, said
                failed = any(output.output_type == "error" for output in stub.outputs)
                assert name != "wrong" or failed or WRONG in said, said
        said = str([cell.get("outputs") for cell in answered.cells])
        assert "takes over" not in said
    shipped = ledgers["as shipped"]
    for ledger in ledgers.values():
        assert {i: c["verdict"] for i, c in ledger.items()} == {
            i: c["verdict"] for i, c in shipped.items()
        }
        for i, claim in ledger.items():
            want = shipped[i]["measured"]  # None: a figure that could not be had
            assert claim["measured"] == (None if want is None else pytest.approx(want, 1e-4, 1e-4))
    committed = read_json(path.parent / "results" / f"{MODEL}.json")
    assert {claim["id"] for claim in committed["claims"]} - set(shipped) <= STUDIED
    assert ("ioi.published_heads" in shipped) == ("IOI" in path.stem)
    assert_no_claim_holds(shipped)


def assert_no_claim_holds(ledger):
    """None about the model: toys are trained in the notebook, the census's rows are committed."""
    held = [i for i, claim in ledger.items() if claim["verdict"] == HOLDS]
    assert [i for i in held if not i.startswith(("toy.", "census."))] == []


@pytest.mark.nightly
def test_random_weights_in_gpt2_smalls_full_shape_take_no_more_memory_than_a_laptop_has(
    path, notebook, tmp_path, capfd, gpt2_full_shape
):
    with capfd.disabled():
        print()
        assert_no_claim_holds(run_on_random_weights(notebook, path, tmp_path, gpt2_full_shape))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss  # KiB, of the largest kernel
    assert peak < 16 * 2**20


def test_every_claim_of_the_notebook_is_tested(path):
    committed = {c["id"] for c in read_json(path.parent / "results" / f"{MODEL}.json")["claims"]}
    # those of the census stand with their project's
    (module,) = (m for m in path.parent.glob("*_claims.py") if m.stem != "census_claims")
    claims = import_module(module.stem).CLAIMS
    assert committed == {i for i, claim in claims.items() if claim.only_for in (None, MODEL)}


# What a reader sees


def test_cells_are_short(notebook):
    # All but the figure of the training, which stays together.
    cells = [cell for cell in code(notebook) if "def training_figure" not in cell.source]
    setup, *others = [sum(map(bool, cell.source.replace(" ", "").split("\n"))) for cell in cells]
    assert setup <= 14  # folded on Colab
    assert max(others) <= 12 and statistics.median(others) <= 6


def test_a_cell_can_be_run_again_after_any_later_one(notebook):
    """What a cell reads of earlier ones, no later cell binds anew."""
    names = [bound_and_read(cell.source) for cell in code(notebook)]
    for i, (bound, read) in enumerate(names):
        later = set().union(*(bound for bound, _ in names[i + 1 :]))
        assert not (read - bound) & later


def bound_and_read(source):
    """Names that a cell binds, and those that it or its functions read from outside."""
    table = symtable.symtable(source, "cell", "exec")
    bound = {
        symbol.get_name()
        for symbol in table.get_symbols()
        if symbol.is_assigned() or symbol.is_imported() or symbol.is_namespace()
    }
    read, inner = {s.get_name() for s in table.get_symbols() if s.is_referenced()}, [table]
    while inner:
        inner = [child for parent in inner for child in parent.get_children()]
        symbols = [s for child in inner for s in child.get_symbols()]
        read |= {s.get_name() for s in symbols if s.is_global() and s.is_referenced()}
    return bound, read


def test_the_study_is_of_the_circuit_in_the_ledger():
    for study in (ROOT / "project-2-Indirect-Object-Identification/results/study").glob("*.json"):
        ledger = read_json(study.parents[1] / study.name)
        roles = {role: list(map(Head.from_label, hs)) for role, hs in ledger["heads"].items()}
        assert set(read_json(study)["roles"]) == set(map(str, nodes(roles)))


def test_no_head_is_named_that_was_not_computed(notebook):
    for cell in notebook.cells:
        # "L3H5 (layer 3, ...)" explains the notation.
        assert not re.search(r"\bL\d+H\d+\b(?! \(layer)", cell.source), cell.source
        assert not re.search(r"\b[Hh]eads?\b\W{1,3}\d+\.\d+", cell.source), cell.source


def test_exercises_are_in_order_and_have_help(notebook):
    places = find_exercises(notebook)
    assert [place.exercise.number for place in places] == list(range(1, len(places) + 1))
    ends = [place.stub for place in places[1:]] + [len(notebook.cells)]
    for place, end in zip(places, ends, strict=True):
        above = notebook.cells[place.stub - 1].source
        assert f"### Exercise {place.exercise.number}: " in above
        assert re.search(r"Difficulty [1-5] of 5, about \d+ minutes", above)
        assert '"""' in notebook.cells[place.stub].source
        help_text = "\n".join(cell.source for cell in notebook.cells[place.stub : end])
        assert "<summary>Hint" in help_text
        assert help_text.count("<details>") == help_text.count("</details>")
        if place.solution:
            lines = f"@checks.{place.exercise.name}\ndef {place.exercise.name}("
            assert lines in place.solution


def test_answers_are_used_below_and_progress_is_shown_at_the_end(notebook):
    for place in find_exercises(notebook):
        # A dot before the name means a function of utils.
        mention = re.compile(rf"(?<![\w.]){place.exercise.name}\b")
        below = [c.source for c in notebook.cells[place.stub + 1 :] if c.cell_type == "code"]
        used = any(mention.search(source) for source in below)
        assert used or isinstance(place.exercise, Stretch), place.exercise
    source = "\n".join(cell.source for cell in code(notebook))
    assert source.rindex("checks.progress()") > source.rindex("raise NotImplementedError()")


def test_a_learner_predicts_before_looking(notebook):
    cells = notebook.cells
    asked = [i for i, cell in enumerate(cells) if "checks.predict(" in cell.source]
    assert len(asked) >= 5
    for i, end in zip(asked, [*asked[1:], len(cells)], strict=True):
        assert "mine=None" in cells[i].source
        below = "\n".join(c.source for c in cells[i:end] if c.cell_type == "markdown")
        assert "<details><summary>What is seen" in below


def test_there_are_enough_exercises_and_experiments():
    places = [p for path in NOTEBOOKS for p in find_exercises(nbformat.read(path, as_version=4))]
    runs = re.compile(r"model\(|run_with|run_circuit|toy\w*\(|record\(|sweep\(")
    bodies = [place.solution.split('"""')[-1] for place in places if place.solution]
    long = [body for body in bodies if len(body.strip().splitlines()) >= 5]
    assert len(places) >= 28
    assert sum(bool(runs.search(body)) for body in long) >= 12


def test_first_cells(path, notebook):
    badge, overview, setup = notebook.cells[:3]
    assert [cell.cell_type for cell in (badge, overview, setup)] == ["markdown", "markdown", "code"]
    assert overview.source.startswith("## What you will learn")
    assert setup.metadata["cellView"] == "form"  # folded on Colab
    repository = re.search(r'Repository = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f'"{repository}"' in setup.source
    name = repository.removeprefix("https://github.com/")
    for part in ("colab.research.google.com", name, str(path.relative_to(ROOT))):
        assert part in badge.source


def test_committed_outputs_are_complete_and_light(path, notebook):
    assert path.stat().st_size < MAX_BYTES
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    checks = [notebook.cells[place.stub] for place in find_exercises(notebook)]
    assert all(": not attempted yet." in cell.outputs[0].text for cell in checks)
    assert all(COMPARED in cell.metadata.tags for cell in checks)


def test_every_figure_has_a_picture_that_github_shows(notebook):
    figures = 0
    for cell in code(notebook):
        data = [output.get("data", {}) for output in cell.outputs]
        pictures = [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]
        assert all("image/png" in d for d in data if "application/vnd.plotly.v1+json" in d)
        if any("circuits-vis" in d.get("text/html", "") for d in data):
            assert pictures, "an attention view is blank on GitHub"
        for picture in pictures:
            assert struct.unpack(">II", picture[16:24]) >= (600, 250)  # width, height
            assert len(picture) > 8_000  # an empty plot of this size is smaller
        figures += len(pictures)
    assert figures >= 5


@every_readme
def test_readme_tables_are_those_of_the_committed_results(readme):
    text = readme.read_text(encoding="utf-8")
    assert re.search("<!-- (results|summary):start", text)
    assert with_tables(readme) == text, "run `make outputs`, or python -m tools.notebooks readme"


def test_the_top_readme_shows_every_project(path):
    text, project = (ROOT / "README.md").read_text(encoding="utf-8"), path.parent.name
    for part in (f"<!-- summary:start {project} ", f"({project}/)", f"]({project}/figures/"):
        assert part in text
    assert re.search(rf"colab\.research\.google\.com/\S+/{path.relative_to(ROOT)}\)", text)
    assert (path.parent / "README.md").exists()


@every_readme
def test_readme_links_lead_somewhere(readme):
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text)
    links += re.findall(r'src="(?!http)([^"]+)', text)
    assert [link for link in links if not (readme.parent / link).exists()] == []
