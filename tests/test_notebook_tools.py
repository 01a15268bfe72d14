"""The notebook commands, on small notebooks of their own: run, outputs, readme; and solutions."""

import base64
import itertools
import json
import os
import re
import subprocess
import sys
import types
from io import BytesIO

import nbformat
import numpy as np
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image, ImageColor

from tools import (
    drawings,
    moving_picture,
    notebook_exercises,
    notebook_outputs,
    notebook_run,
    notebooks,
    pages,
    pictures,
)
from tools.results import markdown_table
from utils import plotting
from utils.exercises.exercise import Exercises
from utils.ledger.results import HOLDS, read_json, write_json
from utils.session import ROOT

FILE = BytesIO()
Image.effect_noise((64, 32), 90).convert("RGB").save(FILE, "PNG")
PNG = base64.b64encode(FILE.getvalue()).decode()
HEADER = """
import os
import sys
from IPython.display import HTML, display
from utils.ledger.claims import Claim, Ledger
claims = {
    "toy.copying": Claim("It copies", "here", "rule", lambda figure: figure != 0.7),
    "lm.ablation": Claim("It falls", "here", "rule", lambda effect: effect[0] > 0),
}
ledger = Ledger("project-1-toy", claims, "tiny", "abc")
seed = int(os.environ.get("TOY_SEED", 0))
"""
PART_A = """
print("progress 1%", file=sys.stderr)
print("seed", seed)
display({"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}, raw=True)
display(HTML("circuits-vis-0a1b2c3d-4e5f and circuits-vis-0a1b2c3d-4e50"))
ledger.record("toy.copying", 0.5 + seed / 10)
"""
PART_B = f"""
display({{"image/png": "{PNG}"}}, raw=True)
ledger.record("lm.ablation", (0.25, 0.01, 8))
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A repository of one project; its kernels find this repository's utils."""
    for module in (notebooks, notebook_run, notebook_outputs):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setattr(notebook_run, "BUILD", tmp_path / "build")
    monkeypatch.setattr(notebook_outputs, "OTHER_SEEDS", (1, 2))
    monkeypatch.setattr(drawings, "write_drawings", list)  # not those of this repository
    monkeypatch.setattr(moving_picture, "write_moving_pictures", list)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    folder = tmp_path / "project-1-toy"
    folder.mkdir()
    return folder


def write(folder, *cells, name="toy_notebook"):
    """Write a notebook; a text that begins with # is Markdown, any other code."""
    kinds = {True: new_markdown_cell, False: new_code_cell}
    cells = [kinds[c[0] == "#"](c) if isinstance(c, str) else c for c in cells]
    kernel = {"kernelspec": {"name": "no-such-kernel", "display_name": "x", "language": "python"}}
    path = folder / f"{name}.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=kernel), path)
    return path


def outputs_of(path):
    return [c.outputs for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


def test_run_leaves_a_notebook_and_a_page(project, capsys):
    bar = "from tqdm import tqdm\nfor _ in tqdm(range(3), leave=False): pass\n0"
    warning = "print('careful', file=sys.stderr)"
    source = write(project, "# One", "import os, sys; os.getcwd()", bar, warning)
    before = source.read_bytes()
    assert notebooks.main(["run"]) == 0
    build = project.parent / "build"
    (result,), over, said = outputs_of(build / "toy_notebook.ipynb")
    assert result.data["text/plain"] == repr(str(project))  # runs where the notebook lies
    assert [o.output_type for o in over] == ["execute_result"]  # no bar that is over
    assert [o.text for o in said] == ["careful\n"]
    assert str(project) in (build / "toy_notebook.html").read_text()
    assert source.read_bytes() == before
    out, err = capsys.readouterr()
    assert re.fullmatch(r"toy_notebook: \d+ s; open build/toy_notebook.html or .*ipynb\n", out)
    assert re.search(r"^toy_notebook: cell 1/3, \d+ s: One$", err, re.MULTILINE)


def test_run_shows_the_failing_cell(project, capsys):
    write(project, "x = 1", "## Where it fails", "x = 2\nx / 0", "x = 3")
    assert notebooks.main(["run"]) == 1
    err = capsys.readouterr().err
    assert re.search(r"cell 2/3, \d+ s: Where it fails\n", err)
    assert "x / 0\n" in err and "ZeroDivisionError: division by zero" in err
    assert "\x1b" not in err
    _, (failed,), after = outputs_of(project.parent / "build" / "toy_notebook.ipynb")
    assert (failed.output_type, after) == ("error", [])


def test_run_reports_a_kernel_that_dies(project, capsys):
    write(project, "# Dead", "import os; os._exit(1)")
    assert notebooks.main(["run"]) == 1
    assert re.search(r": Dead\n.*Kernel died", capsys.readouterr().err)


def test_names_choose_notebooks(project, capsys):
    assert notebooks.main(["run"]) == 1
    assert capsys.readouterr().err == f"no notebook in {project.parent}\n"
    both = [write(project, name=f"{n}_notebook") for n in ("first", "second")]
    assert notebooks.find_notebooks() == notebooks.find_notebooks(["project-1"]) == both
    assert notebooks.find_notebooks(["second"]) == both[1:]
    assert notebooks.main(["run", "third"]) == 1
    assert "name: got 'third', have project-1-toy/first_notebook.ipynb" in capsys.readouterr().err


def test_outputs_rewrites_notebook_results_pictures_and_tables(project):
    tagged = new_code_cell(PART_B, metadata={"tags": ["readme-figure:effect"]})
    path = write(project, HEADER, "# Part A: toy", PART_A, "# Part B: model", tagged)
    readme = project / "README.md"
    readme.write_text("# Toy\n<!-- results:start -->\nstale\n<!-- results:end -->\nend\n")
    top = project.parent / "README.md"
    top.write_text("<!-- summary:start project-1-toy lm.ablation -->\n<!-- summary:end -->\n")
    assert notebooks.main(["outputs"]) == 0

    seeds = read_json(project / "results" / "toy_seeds.json")
    recorded = {seed: [claim["id"] for claim in run["claims"]] for seed, run in seeds.items()}
    assert recorded == {"1": ["toy.copying"], "2": ["toy.copying"]}
    ledger = read_json(project / "results" / "tiny.json")
    toy, lm = ledger["claims"]
    assert (toy["measured"], toy["n"], toy["verdict"]) == (0.6, 3, "undecided")
    assert (lm["measured"], lm["n"], lm["verdict"]) == (0.25, 8, "holds")
    assert toy["holds_in"] == "2/3"
    with Image.open(project / "figures" / "effect.png") as picture:
        assert (picture.size, picture.mode) == ((64, 32), "P")
    assert markdown_table(ledger) in (text := readme.read_text())
    assert "stale" not in text and text.endswith("end\n")
    summary = (
        "**1 of 2 claims hold, 1 is undecided** for `tiny`. Some of them:\n\n",
        "- ✓ It falls.<br>Ours: 0.250 ± 0.010 (n = 8).\n",
        "<summary>Claims that are undecided</summary>\n\n- It copies.<br>Ours: 0.600",
    )
    assert all(line in top.read_text() for line in summary)

    _, part_a, part_b = outputs_of(path)
    assert [o.get("text") for o in part_a] == ["seed 0\n", None]  # no progress bar
    notebook = nbformat.read(path, as_version=4)
    view = f"circuits-vis-{notebook.cells[2].id}"
    assert part_a[1].data["text/html"] == f"{view}-0 and {view}-1"
    assert part_b[0].metadata["image/png"] == {"width": 32, "height": 16, "alt": "Picture"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.metadata.language_info == {"name": "python"}

    files = [path, readme, project / "results" / "tiny.json"]
    before = [file.read_bytes() for file in files]
    assert notebooks.main(["outputs"]) == 0
    assert [file.read_bytes() for file in files] == before


LONG = [HEADER, "print('x' * 5000)"]


@pytest.mark.parametrize(
    ("cells", "message"), [(LONG, "want at most 5000"), (["1"], "wrote 0 ledgers, want one")]
)
def test_outputs_of_a_bad_run_are_not_written(project, monkeypatch, capsys, cells, message):
    path = write(project, *cells)
    before = path.read_bytes()
    monkeypatch.setattr(notebook_outputs, "MAX_BYTES", 5000)
    assert notebooks.main(["outputs"]) == 1
    assert message in capsys.readouterr().err
    assert path.read_bytes() == before and not (project / "results").exists()


def test_flat_areas_of_a_stored_picture_keep_their_colours_and_edges_share_a_few():
    palest = [(239, 246, 253), (238, 245, 252), (253, 247, 244), (248, 248, 248)]
    picture = Image.new("RGB", (400, 200), "white")
    for i, colour in enumerate(palest):
        picture.paste(colour, (100 * i, 0, 100 * i + 50, 150))
    for i in range(200):  # a line of another colour in each pixel
        picture.putpixel((i, 180), (i, i // 2, 3))
    light = pictures.with_palette(picture)
    assert [light.convert("RGB").getpixel((100 * i + 9, 9)) for i in range(4)] == palest
    assert light.convert("RGB").getpixel((399, 0)) == (255, 255, 255)
    assert len(light.getcolors()) <= len(palest) + 1 + pictures.EDGES
    bar = Image.new("RGB", (200, 300), "white")  # of colours, one in a row, as browsers draw it:
    for x, y in itertools.product(range(50, 78), range(300)):  # give or take one
        bar.putpixel((x, y), (y * 255 // 300 + (x * y) % 2, 80, 200))
    assert len(pictures.with_palette(bar).getcolors()) >= pictures.BAR  # and shows no bands
    many = Image.merge("RGB", [Image.linear_gradient("L"), *Image.radial_gradient("L").split() * 2])
    many = pictures.with_palette(many.resize((768, 768), Image.Resampling.NEAREST))
    assert len(many.getcolors()) <= 256


def test_a_dark_variant_keeps_hues_and_turns_lightness():
    picture = Image.new("RGB", (40, 20), "white")
    picture.paste((200, 40, 60), (0, 0, 10, 10))
    picture.paste("black", (20, 0, 30, 10))
    with Image.open(BytesIO(pictures.darkened(pictures.png(picture)))) as drawn:
        dark = drawn.convert("RGB")
    assert dark.getpixel((39, 19)) == pictures.DARK_PAGE and dark.getpixel((25, 5)) == (255,) * 3
    red, green, blue = dark.getpixel((5, 5))
    assert red > 200 and red > blue > green
    scale = Image.new("RGB", (6, 1))
    for x, code in enumerate(("#fddbc7", "#f4a582", "#d6604d", "#b2182b", "#67001f", "#d55e00")):
        scale.putpixel((x, 0), ImageColor.getrgb(code))
    with Image.open(BytesIO(pictures.darkened(pictures.png(scale)))) as drawn:
        *reds, orange = (drawn.convert("RGB").getpixel((x, 0)) for x in range(6))
    assert reds == sorted(reds)  # the farther from zero, the brighter
    assert all(red > 1.8 * green and abs(green - blue) < 10 for red, green, blue in reds)
    assert orange[1] > orange[2] + 50


def test_numbers_of_a_stored_figure_are_in_single_precision():
    figure = plotting.lines(
        range(6), {"a": [i / 3 for i in range(6)]}, title="T", x_label="x", y_label="y"
    )
    figure.add_scatter(x=[*range(6)], y=[None] * 6, text=["w"] * 6)
    stored = json.loads(figure.to_json())
    pictures.lighten_numbers(stored)
    line, other = stored["data"]
    assert line["y"]["dtype"] == other["x"]["dtype"] == "f4" and other["y"] == [None] * 6
    got = np.frombuffer(base64.b64decode(line["y"]["bdata"]), "f4")
    assert got == pytest.approx([i / 3 for i in range(6)], abs=1e-6)


def test_a_stored_picture_is_light_and_in_words():
    gradient = Image.linear_gradient("L").resize((400, 400)).convert("RGB")
    file = BytesIO()
    gradient.save(file, "PNG")
    figure = plotting.lines([1, 2], {"a": [1, 2], "b": [0, 1]}, title="T", x_label="x", y_label="y")
    data = {"image/png": base64.b64encode(file.getvalue()).decode()}
    data[notebook_outputs.PLOTLY] = json.loads(figure.to_json())
    notebook = new_notebook(cells=[new_code_cell(outputs=[new_output("display_data", data)])])
    notebook_outputs.clean(notebook)
    (output,) = notebook.cells[0].outputs
    words = "T. Lines over x: a and b rise. y against x. a: from 1 at 1 to 2 at 2; "
    words += "b: from 0 at 1 to 1 at 2"
    shown = {"width": 200, "height": 200, "alt": words}
    assert output.metadata["image/png"] == shown
    with Image.open(BytesIO(base64.b64decode(output.data["image/png"]))) as picture:
        assert len(picture.getcolors()) <= 256
        assert picture.size == (400, 400)
    page = pages.to_html(notebook, "page")
    assert f'alt="{words}"' in page


def test_a_figure_for_the_readme_is_narrower_than_in_the_notebook(tmp_path, monkeypatch):
    asked = {}
    draw = lambda figure, kind, **size: asked.update(size) or FILE.getvalue()  # noqa: E731
    monkeypatch.setattr("plotly.graph_objects.Figure.to_image", draw)
    figure = plotting.bars(["a"], [1], title="T", y_label="y")
    data = {"image/png": PNG, notebook_outputs.PLOTLY: json.loads(figure.to_json())}
    cell = new_code_cell("1", outputs=[new_output("display_data", data)])
    cell.metadata.tags = ["readme-figure:effect"]
    notebook_outputs.write_figures(new_notebook(cells=[cell]), tmp_path)
    assert asked == dict(width=640, height=figure.layout.height, scale=2)
    with Image.open(tmp_path / "figures/effect.png") as picture:
        assert picture.mode == "P"


def test_a_figure_for_the_readme_needs_a_picture(tmp_path):
    cell = new_code_cell("1", metadata={"tags": ["readme-figure:effect"]})
    with pytest.raises(ValueError, match="readme-figure:effect"):
        notebook_outputs.write_figures(new_notebook(cells=[cell]), tmp_path)


def test_readme_command_rewrites_tables_alone_and_each_project_keeps_its_own(project, capsys):
    first, second = project, project.parent / "project-2-other"
    second.mkdir()
    for folder in (first, second):
        write(folder, "raise SystemExit", name=f"{folder.name}_notebook")
        (folder / "README.md").write_text("<!-- results:start -->\n<!-- results:end -->\n")
    assert notebooks.main(["readme"]) == 1
    assert "no results in" in capsys.readouterr().err
    for folder, head in ((first, "L1H1"), (second, "L2H2")):
        ledger = {"model": "m", "versions": {}, "claims": [], "heads": {"induction": [head]}}
        write_json(folder / "results" / "m.json", ledger)
    write_json(first / "results" / "toy_seeds.json", {})
    top = project.parent / "README.md"
    marked = (f"<!-- results:start {f.name} -->\n<!-- results:end -->\n" for f in (second, first))
    top.write_text("".join(marked))
    assert notebooks.main(["readme"]) == 0
    shown = [re.findall(r"L\dH\d", p.read_text()) for p in notebook_outputs.readmes()]
    assert shown == [["L2H2", "L1H1"], ["L1H1"], ["L2H2"]]
    assert notebook_outputs.with_tables(top) == top.read_text()


def test_keep_takes_a_models_results_from_the_last_run(project, capsys):
    write(project, "raise SystemExit")
    assert notebooks.main(["keep", "gpt2-small"]) == 1
    assert "got 'gpt2-small', which build/results does not have" in capsys.readouterr().err
    claim = {"id": "toy.copying", "measured": 0.5, "stderr": None, "n": None, "others": {}}
    claim["verdict"] = HOLDS
    ledger = {"model": "gpt2-small", "versions": {}, "heads": {}}
    for seed, folder in ((0, "build/results/project-1-toy"), (1, "project-1-toy/results")):
        name = "toy_seeds" if seed else "gpt2-small"
        data = ledger | {"claims": [claim | {"measured": 0.5 + seed / 10}]}
        write_json(project.parent / folder / f"{name}.json", {"1": data} if seed else data)
    assert notebooks.main(["keep", "gpt2-small"]) == 0
    kept = read_json(project / "results" / "gpt2-small.json")
    assert kept["claims"][0]["measured"] == 0.55 and kept["claims"][0]["holds_in"] == "2/2"


GH = """#!/bin/sh
echo "gh $*" >> calls.log
case "$2" in list) cat open 2>/dev/null || echo 0 ;; create) echo 1 > open ;; esac
"""


def test_changed_results_become_one_pull_request(tmp_path):
    def git(*arguments, of=tmp_path / "here"):
        done = subprocess.run(["git", "-C", of, *arguments], capture_output=True, check=True)
        return done.stdout.decode()

    here, python = tmp_path / "here", tmp_path / "here/.venv/bin/python"
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "there"], check=True)
    subprocess.run(["git", "clone", "-q", tmp_path / "there", here], check=True)
    for path, text in {
        here / "gh": GH,
        python: "#!/bin/sh\ncp new project-1-x/results/m.json\n",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o755)
    for name in ("README.md", "project-1-x/README.md", "project-1-x/results/m.json", "new"):
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("old")
    (here / ".git/info/exclude").write_text(".venv\ngh\nnew\nopen\ncalls.log\n")
    git("add", "-A")
    git("-c", "user.name=n", "-c", "user.email=e", "commit", "-q", "-m", "first")
    main = git("branch", "--show-current").strip()

    def propose(text):
        (here / "new").write_text(text)
        git("checkout", "-q", main)
        path = f"{here}:{os.environ['PATH']}"
        command = ["sh", ROOT / "tools/propose_results.sh", "m"]
        subprocess.run(command, cwd=here, env=os.environ | {"PATH": path}, check=True)
        calls = here / "calls.log"
        said = calls.read_text() if calls.exists() else ""
        calls.unlink(missing_ok=True)
        return re.findall(r"^gh pr (\w+)", said, re.MULTILINE)

    assert propose("old") == []  # nothing new
    assert propose("newer") == ["list", "create"]
    assert git("show", "results-m:project-1-x/results/m.json", of=tmp_path / "there") == "newer"
    assert propose("newest") == ["list"]  # the request is open: it gets the commit
    assert git("show", "results-m:project-1-x/results/m.json", of=tmp_path / "there") == "newest"
    assert git("show", f"{main}:project-1-x/results/m.json") == "old"


STUB = "@checks.double\ndef double(x):\n    raise NotImplementedError()"
SOLUTION = """Think.
<details><summary>Hint 1</summary>

```python
wrong = 1
```
</details>
<details>
<summary>Solution</summary>

Twice:

```python
@checks.double
def double(x):
    return 2 * x
```

```python
second = 2
```
</details>"""


@pytest.fixture
def checks(monkeypatch):
    module, registry = types.ModuleType("fake_exercises"), Exercises()
    parts = {"reference": lambda x: 2 * x, "cases": lambda: {"three": (3.0,)}}
    module.double = registry.add(number=1, name="double", title="double", part="A", **parts)
    judge = lambda answer: None  # noqa: E731
    module.far = registry.stretch(number=2, name="far", title="far", part="A", judge=judge)
    monkeypatch.setitem(sys.modules, "fake_exercises", module)
    return module


def exercise_notebook(stub=STUB, prose=SOLUTION):
    progress = new_code_cell("checks.progress()", metadata={"tags": ["nbval-check-output"]})
    code = map(new_code_cell, ["import fake_exercises as checks", stub])
    return new_notebook(cells=[*code, new_markdown_cell(prose), progress])


def test_solve_fills_in_solutions_and_expects_what_the_check_prints(checks, capsys):
    notebook = exercise_notebook()
    _, stub, _, progress = notebook_exercises.solve(notebook).cells
    assert stub.source == "@checks.double\ndef double(x):\n    return 2 * x"
    assert stub.outputs[0].text == "Exercise 1 (double): right. Yours is used below.\n"
    assert (stub.metadata.tags, progress.metadata.tags) == (["nbval-check-output"], [])
    assert stub.execution_count is not None
    assert notebook.cells[1].source == STUB
    exec(stub.source, {"checks": checks})
    assert capsys.readouterr().out == stub.outputs[0].text


def test_a_stretch_exercise_stays_as_it_is(checks):
    stub = STUB.replace("double", "far")
    notebook = exercise_notebook(stub, "<summary>Hint</summary>")
    assert notebook_exercises.solve(notebook).cells[1].source == stub


def test_shipped_stubs_expect_not_attempted(checks):
    notebook = exercise_notebook()
    for _ in range(2):
        notebook_exercises.mark_checks(notebook)
    stub = notebook.cells[1]
    assert stub.outputs[0].text == (
        "Exercise 1 (double): not attempted yet. The library's is used below.\n"
    )
    assert stub.metadata.tags == ["nbval-check-output"]


def test_wrong_answers_are_wrong_in_turn(checks):
    notebook = exercise_notebook()
    notebook.cells += [cell for _ in range(4) for cell in exercise_notebook().cells[1:3]]
    broken = notebook_exercises.answer_wrong(notebook).cells
    broken = [cell for cell in broken if cell.cell_type == "code" and "@checks" in cell.source]
    sources = [cell.source for cell in broken]
    assert len({*sources}) == 5 and not any(STUB in source for source in sources)
    fails = ["raises-exception" in cell.metadata.get("tags", []) for cell in broken]
    assert fails == [False, True, True, False, False]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"prose": "No help."}, "stub 'double': wants a solution before the next stub"),
        ({"prose": SOLUTION.replace("python", "text")}, "wants a solution"),
        ({"stub": STUB.replace("@checks.double\n", "")}, "stub 'double': wants @checks.<name>"),
        ({"stub": STUB.replace("def double", "def triple")}, "stub 'triple': wants @checks.<name>"),
        ({"stub": STUB.replace("double", "triple")}, "checks.triple is not a check"),
        ({"stub": STUB.replace("double", "far")}, "a stretch none"),
    ],
)
def test_solve_refuses(checks, changes, text):
    alone, followed = exercise_notebook(**changes), exercise_notebook(**changes)
    followed.cells += exercise_notebook().cells[1:]  # whose solution must not be borrowed
    for notebook in (alone, followed):
        with pytest.raises(ValueError, match=text):
            notebook_exercises.solve(notebook)
