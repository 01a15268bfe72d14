"""The top README: its first screen says what is so."""

import re

import torch

import induction_exercises as checks
import ioi_exercises
from utils.session import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_counts_the_exercises():
    per_project = [len(module.EXERCISES.all) for module in (checks, ioi_exercises)]
    assert [int(n) for n in re.findall(r"; (\d+) exercises, about", README)] == per_project
    assert f"**{sum(per_project)} exercises, " in README


def test_the_exercise_shown_is_told_what_is_shown(capsys):
    section = README.partition("### An exercise, once round\n")[2].partition("\n## ")[0]
    stub, *answers = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    said = re.findall(r"```text\n(.*?)```", section, re.DOTALL)
    body = "    raise NotImplementedError()\n"
    sources = [stub, *(stub.replace(body, answer) for answer in answers)]
    for source, words in zip(sources, said, strict=True):
        exec(source, {"checks": checks, "torch": torch})
        assert capsys.readouterr().out.split() == words.split()
