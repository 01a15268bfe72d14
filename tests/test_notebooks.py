"""The notebooks as a reader meets them: they run, solved or not, on any model, anywhere."""

import base64
import os
import re
import statistics
import struct
import subprocess
import sys
from importlib import import_module

import nbformat
import pytest

from tools.notebook_exercises import COMPARED, find_exercises, solve
from tools.notebook_outputs import MAX_BYTES, readmes, with_tables
from tools.notebook_run import execute
from tools.results import compare
from utils.results import HOLDS, ROOT, read_json, write_file

MODEL = "smollm2-135m"
NOTEBOOKS = sorted(ROOT.glob("project-*/*_notebook.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def run_env(model, results):
    env = {"MECH_INTERP_MODEL": str(model), "MECH_INTERP_RESULTS": str(results)}
    return env | {"PLOTLY_RENDERER": "plotly_mimetype"}  # no browser needed


def run_nbval(path, results, capfd):
    command = [sys.executable, "-m", "pytest", "--nbval-lax", "--nbval-current-env"]
    env = run_env(MODEL, results)
    with capfd.disabled():  # minutes: show that something happens
        print(f"\n{path.relative_to(ROOT)}, cell by cell:")
        done = subprocess.run(
            [*command, "-p", "no:cacheprovider", str(path)], cwd=ROOT, env=os.environ | env
        )
    assert done.returncode == 0


def test_there_is_a_notebook():
    assert NOTEBOOKS  # else every test below would be skipped


@every_notebook
def test_shipped_notebook_gives_its_committed_results(path, tmp_path, capfd):
    run_nbval(path, tmp_path, capfd)
    fresh = read_json(tmp_path / path.parent.name / f"{MODEL}.json")
    committed = read_json(path.parent / "results" / f"{MODEL}.json")
    assert compare(fresh, committed) == []


@pytest.mark.nightly
@every_notebook
def test_solved_notebook_says_right_everywhere(path, tmp_path, capfd):
    # Below the repository, so that the notebook finds it, as a reader's copy would.
    write_file(ROOT / "build/solved" / path.name, nbformat.writes(solve(read(path))))
    run_nbval(ROOT / "build/solved" / path.name, tmp_path, capfd)


@every_notebook
def test_on_random_weights_every_answer_is_right_and_no_claim_holds(
    path, tmp_path, capfd, random_gpt2_folder
):
    notebook = solve(read(path))
    checks = [notebook.cells[place.check] for place in find_exercises(read(path))]
    wanted = [cell.outputs[0].text for cell in checks]
    assert checks and all(text.endswith(": right.\n") for text in wanted)
    with capfd.disabled():
        print()
        env = run_env(random_gpt2_folder, tmp_path)
        execute(notebook, path.parent, env, f"{path.stem}, random weights")
    assert [cell.outputs[0].text for cell in checks] == wanted
    (written,) = tmp_path.glob("*/*.json")
    verdicts = {claim["id"]: claim["verdict"] for claim in read_json(written)["claims"]}
    about_the_model = {i: v for i, v in verdicts.items() if not i.startswith("toy.")}
    committed = read_json(path.parent / "results" / f"{MODEL}.json")
    assert set(verdicts) == {claim["id"] for claim in committed["claims"]}
    assert about_the_model
    assert [i for i, verdict in about_the_model.items() if verdict == HOLDS] == []


@every_notebook
def test_every_claim_of_the_notebook_is_tested(path):
    committed = {c["id"] for c in read_json(path.parent / "results" / f"{MODEL}.json")["claims"]}
    (module,) = path.parent.glob("*_claims.py")
    claims = import_module(module.stem).CLAIMS
    assert committed == {i for i, claim in claims.items() if claim.only_for in (None, MODEL)}


# What a reader sees


@every_notebook
def test_cells_are_short(path):
    # All but the set-up cell and the figure of the training, which stay together.
    cells = [cell for cell in code(read(path))[1:] if "def training_figure" not in cell.source]
    lengths = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells]
    assert max(lengths) <= 12
    assert statistics.median(lengths) <= 6


@every_notebook
def test_no_head_is_named_that_was_not_computed(path):
    for cell in read(path).cells:
        # "L3H5 (layer 3, ...)" explains the notation.
        assert not re.search(r"\bL\d+H\d+\b(?! \(layer)", cell.source), cell.source
        assert not re.search(r"\b[Hh]eads?\b\W{1,3}\d+\.\d+", cell.source), cell.source


@every_notebook
def test_exercises_are_in_order_and_have_help(path):
    notebook = read(path)
    places = find_exercises(notebook)
    assert [place.exercise.number for place in places] == list(range(1, len(places) + 1))
    assert len(places) >= 8
    ends = [place.stub for place in places[1:]] + [len(notebook.cells)]
    for place, end in zip(places, ends, strict=True):
        stub, above = notebook.cells[place.stub].source, notebook.cells[place.stub - 1].source
        name = re.search(r"^def (\w+)", stub, re.MULTILINE)[1]
        assert f"Exercise {place.exercise.number}" in above
        assert '"""' in stub
        assert f"({name})" in notebook.cells[place.check].source
        assert f"def {name}(" in place.solution
        help_text = "\n".join(cell.source for cell in notebook.cells[place.check : end])
        assert "<summary>Hint" in help_text
        assert help_text.count("<details>") == help_text.count("</details>")


@every_notebook
def test_nothing_depends_on_an_answer(path):
    notebook = read(path)
    for place in find_exercises(notebook):
        name = re.search(r"^def (\w+)", notebook.cells[place.stub].source, re.MULTILINE)[1]
        allowed = (notebook.cells[place.stub].id, notebook.cells[place.check].id)
        others = [cell.source for cell in code(notebook) if cell.id not in allowed]
        # A dot before the name means a function of utils.
        assert [source for source in others if re.search(rf"(?<![\w.]){name}\b", source)] == []


@every_notebook
def test_progress_is_shown_at_the_end(path):
    source = "\n".join(cell.source for cell in code(read(path)))
    assert "checks.progress()" in source
    assert source.rindex("checks.progress()") > source.rindex("raise NotImplementedError()")


@every_notebook
def test_first_cells(path):
    badge, setup = read(path).cells[:2]
    assert "colab.research.google.com" in badge.source
    assert str(path.relative_to(ROOT)) in badge.source
    assert (badge.cell_type, setup.cell_type) == ("markdown", "code")
    repository = re.search(r'Repository = "(.+)"', (ROOT / "pyproject.toml").read_text())[1]
    assert f'"{repository}"' in setup.source
    assert repository.removeprefix("https://github.com/") in badge.source


@every_notebook
def test_committed_outputs_are_complete_and_light(path):
    notebook = read(path)
    assert path.stat().st_size < MAX_BYTES
    counts = [cell.execution_count for cell in code(notebook)]
    assert counts == list(range(1, len(counts) + 1))
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    checks = [notebook.cells[place.check] for place in find_exercises(notebook)]
    assert all(cell.outputs[0].text.endswith(": not attempted yet.\n") for cell in checks)
    assert all(COMPARED in cell.metadata.tags for cell in checks)


@every_notebook
def test_every_figure_has_a_picture_that_github_shows(path):
    figures = 0
    for cell in code(read(path)):
        data = [output.get("data", {}) for output in cell.outputs]
        pictures = [base64.b64decode(d["image/png"]) for d in data if "image/png" in d]
        interactive = [d for d in data if "application/vnd.plotly.v1+json" in d]
        assert all("image/png" in d for d in interactive)
        if any("circuits-vis" in d.get("text/html", "") for d in data):
            assert pictures, "an attention view is blank on GitHub"
        for picture in pictures:
            width, height = struct.unpack(">II", picture[16:24])
            assert (width, height) >= (600, 250)
            assert len(picture) > 8_000  # an empty plot of this size is smaller
        figures += len(pictures)
    assert figures >= 5


@pytest.mark.parametrize("readme", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_readme_tables_are_those_of_the_committed_results(readme):
    text = readme.read_text(encoding="utf-8")
    assert re.search("<!-- (results|summary):start", text)
    assert with_tables(readme) == text, "run `make outputs`, or python -m tools.notebooks readme"


@every_notebook
def test_the_top_readme_shows_every_project(path):
    text, project = (ROOT / "README.md").read_text(encoding="utf-8"), path.parent.name
    assert f"<!-- summary:start {project} " in text
    assert f"({project}/)" in text
    assert f"]({project}/figures/" in text
    assert re.search(rf"colab\.research\.google\.com/\S+/{path.relative_to(ROOT)}\)", text)
    assert (path.parent / "README.md").exists()


@pytest.mark.parametrize("readme", readmes(), ids=lambda path: str(path.relative_to(ROOT)))
def test_readme_links_lead_somewhere(readme):
    text = readme.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", text) + re.findall(
        r'src="(?!http)([^"]+)', text
    )
    assert [link for link in links if not (readme.parent / link).exists()] == []
