"""Mutants: the lines left alone, whose tests they meet, and how a changed module is put in."""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tools import mutants
from utils.session import ROOT

SOURCE = '''"""A module."""
from math import pi

import torch


@torch.no_grad()
def area(
    radius: float,
    scale: "1 + 1" = 2,
) -> "2 * 3":
    """Of a disc,
    2 lines."""
    return scale * pi * radius**2
'''


def test_what_makes_no_figure_is_left_alone():
    lines = SOURCE.splitlines()
    changed = {
        line for i, line in enumerate(lines, 1) if line and i not in mutants.untouched(SOURCE)
    }
    assert changed == {"def area(", "    return scale * pi * radius**2"}


def test_a_mutant_meets_the_tests_of_its_module_first(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert mutants.tests_of("utils.heads")[0] == "tests/test_heads.py"
    of_selection = mutants.tests_of("utils.selection")
    ends = of_selection[0], of_selection[-1]
    assert ends == ("tests/test_selection.py", "tests/test_bad_inputs.py")
    without = mutants.tests_of("utils.selection", "RemoveDecorator")  # the checks go with it
    assert without[0] == "tests/test_bad_inputs.py"
    of_engine = mutants.tests_of("utils.engine.packs")
    assert of_engine[0] == "tests/test_replay.py" and "tests/test_paths.py" in of_engine
    assert not any("notebooks" in path for path in of_engine)


def test_a_changed_module_takes_the_place_of_the_file(tmp_path, monkeypatch):
    (tmp_path / "answer.py").write_text("found = 42\n")
    monkeypatch.syspath_prepend(tmp_path)
    path = str(Path(tmp_path, "answer.py"))
    finder = mutants.Changed("answer", path, "found = 41\n")
    monkeypatch.setattr(sys, "meta_path", [finder, *sys.meta_path])
    assert import_module("answer").found == 41
    sys.modules.pop("answer")
    assert mutants.Mutant("utils/engine/packs.py", 1, "AddNot", 0).module == "utils.engine.packs"


@pytest.mark.skipif(not hasattr(os, "posix_spawn"), reason="mutants run in forks")
def test_only_a_test_that_fails_in_time_kills(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROWS", tmp_path / "rows")
    monkeypatch.setattr(mutants, "SECONDS", 1)
    commands = {1: "exit 1", 2: "exit 0", 3: "exec sleep 60"}  # by the mutant's line

    def start(mutant, files):
        command = ["sh", "-c", commands[mutant.line]]
        return os.posix_spawn("/bin/sh", command, os.environ, setpgroup=0)

    monkeypatch.setattr(mutants, "start", start)
    three = [mutants.Mutant("utils/heads.py", line, "AddNot", 0) for line in commands]
    mutants.run(three, workers=2)
    assert mutants.known() == dict(zip(three, (False, True, True), strict=True))
