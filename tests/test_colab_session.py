"""A Colab session as it was tried: the notebook alone, in an environment that is not ours."""

import json
import os
import subprocess

import nbformat
import pytest
from environments import copy_repository, make_environment, versions
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell
from test_notebooks import NOTEBOOKS, SHORT_TRAINING, assert_no_claim_holds

from tools.notebook_run import progress
from utils.ledger.results import read_json

pytestmark = pytest.mark.nightly
OLD = "transformers==4.57.1"  # such as a machine may bring, too old for the notebooks
START = "import google.colab; from ipykernel.kernelapp import launch_new_instance as start; start()"
URL = "https://github.com/mech-interp-replications/mech-interp-replications"


@pytest.fixture(scope="module")
def remote(tmp_path_factory):
    """A git repository with the files as they are now."""
    folder = copy_repository(tmp_path_factory.mktemp("remote") / "repository")
    who = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", "-C", folder, *command], check=True)
    return folder.as_uri()


@pytest.fixture(scope="module")
def colab(tmp_path_factory):
    """The Python that Colab has before the first cell, and a kernel for it.

    There are torch, numpy, an old transformers, and Colab's own package, which is imported.
    """
    folder = tmp_path_factory.mktemp("colab")
    python = make_environment(folder / "venv", "torch", "numpy", "pandas", "ipykernel")
    subprocess.run([python, "-m", "pip", "install", "-q", OLD], check=True)
    (site,) = (folder / "venv").glob("lib/*/site-packages")
    (site / "google/colab").mkdir(parents=True)
    (site / "google/colab/__init__.py").touch()
    argv = [str(python), "-c", START, "-f", "{connection_file}"]
    (folder / "kernels/colab").mkdir(parents=True)
    spec = json.dumps(dict(argv=argv, display_name="Colab", language="python"))
    (folder / "kernels/colab/kernel.json").write_text(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder))
        yield python


def run(cells, folder, remote, **env):
    """Runs cells in a new session, in `folder`, where git fetches from `remote`."""
    notebook = nbformat.v4.new_notebook(cells=cells)
    folder.mkdir(exist_ok=True)
    client = NotebookClient(
        notebook,
        timeout=None,
        kernel_name="colab",
        resources={"metadata": {"path": str(folder)}},
        coalesce_streams=True,
        on_cell_start=progress(notebook, "Colab"),
    )
    git = {"COUNT": "1", "KEY_0": f"url.{remote}.insteadOf", "VALUE_0": URL}
    env |= os.environ | {f"GIT_CONFIG_{key}": git[key] for key in git} | env
    env.pop("PYTEST_CURRENT_TEST", None)  # with it the kernel hides what commands such as git say
    client.execute(env=env)


def code(path):
    """A notebook's code cells, not yet run, and how many of them are the set-up."""
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    for cell in cells:
        cell.outputs, cell.execution_count = [], None
    return cells, 1 + next(i for i, cell in enumerate(cells) if "\nset_up(" in cell.source)


def said(cell):
    return "".join(output.get("text", "") for output in cell.outputs)


@pytest.fixture(scope="module")
def restarted(colab, remote, tmp_path_factory):
    """After a session that had imported what had to change: folder, its set-up, packages before."""
    folder, before = tmp_path_factory.mktemp("content"), versions(colab)
    setup = code(NOTEBOOKS[0])[0][0]
    with pytest.raises(CellExecutionError) as stopped:
        run([new_code_cell("import transformers"), setup], folder, remote)
    return folder, setup, before, stopped.value


def test_a_failed_fetch_stops_with_its_own_message(colab, tmp_path):
    for path in NOTEBOOKS:
        with pytest.raises(CellExecutionError) as stopped:
            run(code(path)[0], tmp_path, (tmp_path / "nowhere").as_uri())
        assert stopped.value.ename == "RuntimeError"
        assert stopped.value.evalue.startswith("Not fetched: ")
        assert list(tmp_path.iterdir()) == []


def test_the_set_up_says_that_it_installs_and_asks_for_the_restart_that_it_needs(restarted):
    _, setup, _, stopped = restarted
    assert stopped.evalue.startswith("Choose Runtime > Restart session and run this notebook again")
    assert "transformers" in stopped.evalue
    assert "Cloning into" in said(setup) and "Installing transformer-lens" in said(setup)


def test_what_was_there_stays_but_for_what_is_too_old(colab, restarted):
    before, after = restarted[2], versions(colab)
    changed = {name for name in before if after[name] != before[name]}
    assert changed <= {"transformers", "tokenizers", "huggingface-hub"} and changed


def test_the_offline_model_is_fetched_where_it_is_chosen(restarted, remote):
    cells, _ = code(NOTEBOOKS[0])
    loads = next(i for i, cell in enumerate(cells) if "load_model()" in cell.source)
    run(cells[: loads + 1], restarted[0], remote, MECH_INTERP_MODEL="smollm2-135m")
    assert "Installing the offline model" in said(cells[0])
    assert "Model: smollm2-135m on cpu" in said(cells[loads])


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_both_notebooks_run_to_the_end(restarted, remote, path, tmp_path, capfd, gpt2_stand_in):
    cells, start = code(path)
    cells.insert(start, new_code_cell(SHORT_TRAINING))
    env = dict(MECH_INTERP_MODEL=str(gpt2_stand_in), MECH_INTERP_RESULTS=str(tmp_path))
    with capfd.disabled():
        run(cells, restarted[0], remote, **env)
    assert said(cells[0]) == ""  # all is there by now
    outputs = [output for cell in cells for output in cell.outputs if "data" in output]
    assert sum("Plotly.newPlot" in output.data.get("text/html", "") for output in outputs) >= 5
    (written,) = tmp_path.glob("*/*.json")
    assert_no_claim_holds({claim["id"]: claim for claim in read_json(written)["claims"]})
