"""The exercise machinery: every way to be wrong has its own line, and a check never raises."""

import importlib

import pytest
import torch

from utils.exercises import Exercises
from utils.results import ROOT

NAMES = sorted(path.stem for path in ROOT.glob("project-*/*_exercises.py"))
REGISTRIES = [importlib.import_module(name).EXERCISES for name in NAMES]
ALL = [exercise for registry in REGISTRIES for exercise in registry.all.values()]


def row_means(x):
    return x.mean(dim=1)


def make(**changes):
    registry = Exercises()
    fields = dict(number=3, title="row means", reference=row_means)
    fields["cases"] = lambda: {"a 2 x 3 matrix": (torch.arange(6.0).reshape(2, 3),)}
    fields["mistakes"] = {"You averaged over rows, not columns.": lambda x: x.mean(dim=0)}
    return registry, registry.add(**(fields | changes))


def raises(x):
    y = x + 1
    return y[7]


def raises_lines(x):
    raise ValueError("first\nsecond")


def in_place(x):
    x -= x.mean(dim=1, keepdim=True)
    return x[:, 0]


def stub(x, *why):
    raise NotImplementedError(*why)


CASE, SIZE = "For a 2 x 3 matrix", "index 7 is out of bounds for dimension 0 with size 2"


def raised(kind, answer, line, text):
    line += answer.__code__.co_firstlineno
    return f"Your function raised {kind} at line {line} of its cell: {text}"


SAID = [  # answer, what is said after "not right yet. "
    (lambda x: x.T.mean(dim=1), "You averaged over rows, not columns."),
    (lambda x: None, "Your function returned None: did you forget `return`?"),
    (lambda x: [1, 2], f"{CASE}: got a list, want a tensor of shape [2]."),
    (lambda x: x, f"{CASE}: got shape [2, 3], want [2]."),
    (lambda x: row_means(x) + 2 * x[:, 0], f"{CASE}: off by up to 6; entry [1] is 10, want 4."),
    (lambda x: row_means(x) / 0 * 0, f"{CASE}: 2 of 2 values are NaN."),
    (lambda x: row_means(x) / 0, f"{CASE}: off by up to inf; entry [0] is inf, want 1."),
    (in_place, "Your function changes its input in place; work on a copy (`x = x.clone()`)."),
    (raises, raised("IndexError", raises, 2, SIZE)),
    (raises_lines, raised("ValueError", raises_lines, 1, "first")),
    (None, "Give the check your function itself; it got a NoneType."),
    (torch.zeros(2), "Give the check your function itself; it got a Tensor."),
]


def line(capsys, answer, **changes):
    """What the check prints about an answer, without the exercise's name."""
    _, exercise = make(**changes)
    assert exercise(answer) is None
    return capsys.readouterr().out.removeprefix("Exercise 3 (row means): ")


@pytest.mark.parametrize(("answer", "text"), SAID)
def test_message(answer, text, capsys):
    assert line(capsys, answer) == f"not right yet. {text}\n"


def test_right_and_untried(capsys):
    _, exercise = make()
    exercise(in_place)
    exercise(row_means)  # on an argument of its own
    assert capsys.readouterr().out.endswith("right.\n")
    assert line(capsys, lambda x: row_means(x) + 1e-6) == "right.\n"  # float error
    assert line(capsys, stub) == "not attempted yet.\n"
    assert "raised NotImplementedError" in line(capsys, lambda x: stub(x, "no kernel for this"))


def test_later_cases_numbers_and_dicts(capsys):
    cases = {"zeros": (torch.zeros(2, 2),), "ones": (torch.ones(2, 2),)}
    said = line(capsys, lambda x: torch.zeros(2), cases=lambda: cases)
    assert "For ones: off by up to 1" in said
    number = dict(reference=lambda x: 1.5)
    assert line(capsys, lambda x: torch.tensor(1.5), **number) == "right.\n"
    said = line(capsys, lambda x: [1.5], **number)
    assert said.endswith("got a list, want a tensor of shape [].\n")
    cases = {"a": ({"S2": torch.tensor([1, 0])},)}
    said = line(capsys, lambda at: at.update(S2=[0, 1]) or 1.5, **number, cases=lambda: cases)
    assert "changes its input in place" in said


def test_progress(capsys):
    registry, exercise = make()
    others = dict(reference=row_means, cases=dict, mistakes=exercise.mistakes)
    registry.add(number=1, title="another", **others)
    exercise(row_means)
    capsys.readouterr()
    table = registry.progress()
    assert capsys.readouterr().out == "Exercises solved: 1 of 2.\n"
    assert list(table["state"].items()) == [(1, "not attempted yet"), (3, "right")]


SLIPS = [
    ({"mistakes": {"You did wrong.": lambda x: x.sum(1) / 3}}, "mistake 'You did wrong.'"),
    ({"reference": in_place}, "reference does not pass"),
    ({"cases": dict}, "no cases"),
]


@pytest.mark.parametrize(("changes", "text"), SLIPS)
def test_problems_names_a_slip_in_the_exercise_itself(changes, text):
    _, exercise = make(**changes)
    assert text in exercise.problems()[0]


def test_bad_registrations():
    (registry, _), parts = make(), dict(title="", reference=row_means, cases=dict)
    with pytest.raises(ValueError, match="number: 3 is already taken"):
        registry.add(number=3, mistakes={"a": ()}, **parts)
    with pytest.raises(ValueError, match="mistakes: "):
        registry.add(number=4, mistakes={}, **parts)


@pytest.mark.parametrize("exercise", ALL, ids=str)
def test_every_mistake_is_told_by_its_own_message(exercise):
    assert exercise.problems() == []
    assert len(exercise.mistakes) >= 3


@pytest.mark.parametrize("registry", REGISTRIES)
def test_exercises_are_numbered_without_gaps(registry):
    assert sorted(registry.all) == list(range(1, len(registry.all) + 1))
