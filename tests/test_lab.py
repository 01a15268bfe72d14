"""The learner's copies: made once, never overwritten, and their first cell finds the repository."""

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from test_colab import without_notice

from tools import lab, notebooks
from utils.session import ROOT


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of two notebooks, in a folder with spaces in its name."""
    folder = tmp_path / "a copy of it"
    for module in (lab, notebooks):
        monkeypatch.setattr(module, "ROOT", folder)
    monkeypatch.setattr(lab, "MY", folder / "my")
    for name in ("project-1-a/a_notebook", "project-2-b/b_notebook"):
        write(folder / f"{name}.ipynb", "1 + 1")
    return folder


def write(path, source):
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = nbformat.v4.new_output("stream", text="2")
    cell = new_code_cell(source, outputs=[shown], execution_count=1)
    nbformat.write(new_notebook(cells=[cell]), path)


def test_copies_are_made_without_outputs_and_then_left_alone(repository, capsys):
    first, second = lab.copy_notebooks()
    assert (first, second) == (
        repository / "my/a_notebook.ipynb",
        repository / "my/b_notebook.ipynb",
    )
    (cell,) = nbformat.read(first, as_version=4).cells
    assert (cell.source, cell.outputs, cell.execution_count) == ("1 + 1", [], None)
    assert capsys.readouterr().out.splitlines()[0] == "my/a_notebook.ipynb: a copy for you."

    learned = nbformat.read(first, as_version=4)
    learned.cells[0].source = "mine"
    nbformat.write(learned, first)
    second.write_text("broken by its owner")
    before = [copy.read_bytes() for copy in (first, second)]
    lab.copy_notebooks()
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "my/a_notebook.ipynb: yours, as you left it."
    write(repository / "project-1-a/a_notebook.ipynb", "1 + 2")
    lab.copy_notebooks()
    out = capsys.readouterr().out.splitlines()
    assert "yours, as you left it. project-1-a/a_notebook.ipynb has changed since" in out[0]
    assert [copy.read_bytes() for copy in (first, second)] == before


def test_new_outputs_alone_are_no_newer_version(repository, capsys):
    lab.copy_notebooks()
    path = repository / "project-1-a/a_notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].outputs = []
    nbformat.write(notebook, path)
    capsys.readouterr()
    lab.copy_notebooks()
    assert "changed" not in capsys.readouterr().out


@pytest.mark.parametrize(("user", "allowed"), [(1000, []), (0, ["--allow-root"])])
def test_lab_opens_the_first_notebook_in_the_same_environment(
    repository, monkeypatch, capsys, user, allowed
):
    become = Mock()
    monkeypatch.setattr(os, "geteuid", lambda: user, raising=False)
    monkeypatch.setattr(os, "execv", become)
    monkeypatch.chdir(repository)  # and back after the test
    lab.main(["--no-browser"])
    (python, command), _ = become.call_args
    opens = [sys.executable, "-m", "jupyterlab"]
    opens += ["--LabApp.default_url=/lab/tree/my/a_notebook.ipynb"]
    assert (python, command[:4], command[6:]) == (sys.executable, opens, ["--no-browser", *allowed])
    assert os.getcwd() == str(repository)
    (layout,) = (repository / "my/.layout").iterdir()
    assert f"--LabApp.workspaces_dir={layout.parent}" in command
    shown = json.loads(layout.read_text("utf-8"))["data"]["layout-restorer:data"]["left"]
    assert shown["current"] == lab.CONTENTS and not shown["collapsed"]
    layout.write_text("as the learner left it")
    lab.open_contents(layout.parent)
    assert layout.read_text() == "as the learner left it"
    path = "Learning path: my/a_notebook.ipynb, then my/b_notebook.ipynb."
    assert path in capsys.readouterr().out


@pytest.mark.parametrize("path", notebooks.find_notebooks(), ids=lambda path: path.stem)
def test_the_first_code_cell_finds_the_repository_from_my(path, tmp_path):
    cells = [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    folder = tmp_path / "a copy of it"
    (folder / "my").mkdir(parents=True)
    for item in ("utils", path.parent.name):
        (folder / item).symlink_to(ROOT / item)
    says = f"{cells[0].source}\nprint(os.getcwd())"
    done = subprocess.run(
        [sys.executable, "-c", says], cwd=folder / "my", capture_output=True, text=True
    )
    assert without_notice(done.stdout).strip() == str(path.parent), done.stderr


def test_lab_follows_the_scheme_of_the_system():
    settings = json.loads((lab.SETTINGS / "overrides.json").read_text("utf-8"))
    assert settings["@jupyterlab/apputils-extension:themes"] == {"adaptive-theme": True}
