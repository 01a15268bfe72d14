"""The notebooks in JupyterLab: in the kernel's environment, and in one that is not the kernel's."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from urllib.request import urlopen

import nbformat
import pytest
from browsers import LabNotebook, chromium, inked, needs_chromium
from environments import copy_repository, make_environment
from test_notebooks import NOTEBOOKS, SHORT_TRAINING

from tools.notebook_exercises import STUB, find_exercises
from utils.exercises.exercise import RIGHT, WRONG

pytestmark = [
    needs_chromium,
    pytest.mark.skipif(
        not find_spec("jupyterlab") and not os.environ.get("CI"),
        reason="no JupyterLab here: `make lab` installs it",
    ),
]
ENDS = {"induction_heads_notebook": "# Part B", "IOI_notebook": "# 3. "}  # of what is run
VIEWS = ("application/vnd.plotly.v1+json", "text/html", "image/svg+xml")


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@contextmanager
def serving(command, folder, env):
    """A JupyterLab on a port of its own, its settings and workspaces in `folder`."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--no-browser", "--allow-root", "--expose-app-in-browser"]
    options += [
        f"--ServerApp.port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
    ]
    env = os.environ | {"JUPYTER_CONFIG_DIR": str(folder / "config")} | env
    with open(folder / "log", "w") as log:
        server = subprocess.Popen(
            [*command, *options], cwd=folder / "repository", env=env, stdout=log, stderr=log
        )
    try:
        wait_for(f"http://localhost:{port}/api", server)
        yield f"http://localhost:{port}/lab/tree"
    finally:
        server.send_signal(signal.SIGTERM)  # ends its kernels too
        server.wait(30)


def wait_for(url, server, seconds=60):
    for _ in range(10 * seconds):
        assert server.poll() is None
        try:
            return urlopen(url).close()
        except OSError:
            time.sleep(0.1)
    raise TimeoutError(url)


@pytest.fixture(scope="module", params=["same environment", "another environment"])
def server(request, tmp_path_factory, gpt2_stand_in):
    """Both notebooks, as `make lab` opens them, or from an environment that has JupyterLab alone.

    Toys are trained briefly, the model is small.
    """
    folder = tmp_path_factory.mktemp(request.param.replace(" ", "-"))
    repository = copy_repository(folder / "repository")
    make_copies = "from tools.lab import copy_notebooks; copy_notebooks()"
    subprocess.run([sys.executable, "-c", make_copies], cwd=repository, check=True)
    command, kernel = [sys.executable, "-m", "tools.lab"], "python3"
    if request.param != "same environment":
        kernel = "ours"  # JupyterLab serves no links
        python = make_environment(folder / "venv", "jupyterlab", bring=shutil.copyfile)
        install = ["ipykernel", "install", "--prefix", str(folder / "venv"), "--name", kernel]
        subprocess.run([sys.executable, "-m", *install], check=True)
        command = [str(python), "-m", "jupyterlab"]
    for path in (repository / "my").iterdir():
        copy = nbformat.read(path, as_version=4)
        copy.metadata.kernelspec = {"name": kernel, "display_name": kernel}
        setup = next(cell for cell in copy.cells if "\nset_up(" in cell.source)
        setup.source += f"\n{SHORT_TRAINING}"
        nbformat.write(copy, path)
    with serving(command, folder, {"MECH_INTERP_MODEL": str(gpt2_stand_in)}) as url:
        yield url


same_environment = pytest.mark.parametrize("server", ["same environment"], indirect=True)


@pytest.fixture
def opened(browser, server, request):
    """Opens a notebook; at the end fails on an error of a script or a request elsewhere."""
    trouble = []

    def open_(path):
        page = browser.new_page(viewport=dict(width=1280, height=900))
        request.addfinalizer(page.close)
        page.route("https://colab.research.google.com/**", lambda r: r.fulfill(body=""))  # a badge
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("console", lambda said: said.type == "error" and trouble.append(said.text))
        home = server.removesuffix("/lab/tree")
        page.on("request", lambda r: r.url.startswith(home) or trouble.append(r.url))
        return LabNotebook(page, f"{server}/my/{path.name}")

    yield open_
    assert [t for t in trouble if not t.startswith(("https://colab", "data:", "blob:", "ws"))] == []


def code(path):
    """Index and cell of each code cell."""
    cells = nbformat.read(path, as_version=4).cells
    return [(i, cell) for i, cell in enumerate(cells) if cell.cell_type == "code"]


def part(path):
    """The code cells before a heading, training cut short."""
    cells = nbformat.read(path, as_version=4).cells
    end = next(i for i, c in enumerate(cells) if c.source.startswith(ENDS[path.stem]))
    return [(i, cell) for i, cell in code(path) if i < end]


def assert_drawn(view, index):
    """A figure, drawing or table is there, and is not blank."""
    figure = view.locator(".js-plotly-plot .main-svg")
    if view.locator(".js-plotly-plot").count():
        figure.first.wait_for(timeout=30_000)
    view.scroll_into_view_if_needed()
    box = view.bounding_box()
    assert box["width"] > 100 and box["height"] > (200 if figure.count() else 30), f"cell {index}"
    assert inked(view) > 0.01, f"cell {index} is blank"


def run_and_look(notebook, cells):
    """Run cells, and see drawn what the committed notebook shows; returns how many views."""
    seen = 0
    for index, cell in cells:
        notebook.run(index)
        wanted = sum(any(kind in o.get("data", {}) for kind in VIEWS) for o in cell.outputs)
        if "circuits-vis" in str(cell.outputs):
            wanted -= 1  # what is stored has a still picture too
        if wanted:
            views = notebook.shown(index)
            assert views.count() >= wanted, f"cell {index}"
            for view in views.all():
                assert_drawn(view, index)
        if "widgets." in cell.source:
            assert notebook.move_controls(index)
        seen += wanted
    return seen


@same_environment
def test_the_first_cells_run_and_the_first_figures_are_drawn(opened):
    notebook = opened(NOTEBOOKS[0])
    first = next(i for i, c in code(NOTEBOOKS[0]) if "plotting." in c.source)
    assert run_and_look(notebook, [(i, c) for i, c in code(NOTEBOOKS[0]) if i <= first]) == 2
    assert notebook.page.get_by_text("Jupyter news").count() == 0  # no question at the start


@pytest.mark.nightly
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_every_figure_of_a_part_is_drawn(opened, path):
    assert run_and_look(opened(path), part(path)) >= 8


@pytest.mark.nightly
def test_an_answer_is_typed_in_and_checked_at_once(opened):
    path = NOTEBOOKS[0]
    place = find_exercises(nbformat.read(path, as_version=4))[0]
    notebook, cells = opened(path), dict(code(path))
    for index in (i for i in cells if i < place.stub):
        notebook.run(index)
    notebook.type_into(place.stub, cells[place.stub].source.replace(STUB, "return tokens"))
    assert f"{place.exercise}: {WRONG}" in notebook.run(place.stub)
    notebook.type_into(place.stub, place.solution)
    assert f"{place.exercise}: {RIGHT}." in notebook.run(place.stub)
