"""The exercise machinery: every way to be wrong has its own line, and a check never raises."""

import importlib
from pathlib import Path

import pytest
import torch

from utils.exercises import Exercises

NAMES = sorted(p.stem for p in Path(__file__).parent.parent.glob("project-*/*_exercises.py"))
REGISTRIES = [importlib.import_module(name).EXERCISES for name in NAMES]
ALL = [exercise for registry in REGISTRIES for exercise in registry.all.values()]


def row_means(x):
    return x.mean(dim=1)


def make(**changes):
    registry = Exercises()
    fields = dict(
        number=3,
        title="row means",
        reference=row_means,
        cases=lambda: {"a 2 x 3 matrix": (torch.arange(6.0).reshape(2, 3),)},
        mistakes={"You averaged over rows, not columns.": lambda x: x.mean(dim=0)},
    )
    return registry, registry.add(**(fields | changes))


def raises(x):
    y = x + 1
    return y[7]


def in_place(x):
    x -= x.mean(dim=1, keepdim=True)
    return x[:, 0]


def stub(x):
    raise NotImplementedError()


def many_lines(x):
    raise ValueError("first\nsecond")


WRONG = {
    "stub": (stub, "not attempted yet."),
    "reference": (row_means, "right."),
    "float error": (lambda x: row_means(x) + 1e-6, "right."),
    "mistake": (lambda x: x.T.mean(dim=1), "not right yet. You averaged over rows, not columns."),
    "none": (
        lambda x: None,
        "not right yet. Your function returned None: did you forget `return`?",
    ),
    "type": (
        lambda x: [1, 2],
        "not right yet. For a 2 x 3 matrix: got a list, want a tensor of shape [2].",
    ),
    "shape": (lambda x: x, "not right yet. For a 2 x 3 matrix: got shape [2, 3], want [2]."),
    "value": (
        lambda x: row_means(x) + torch.tensor([0.0, 2.0]),
        "not right yet. For a 2 x 3 matrix: off by up to 2; entry [1] is 6, want 4.",
    ),
    "nan": (
        lambda x: row_means(x) / 0 * 0,
        "not right yet. For a 2 x 3 matrix: 2 of 2 values are NaN.",
    ),
    "infinite": (
        lambda x: row_means(x) / 0,
        "not right yet. For a 2 x 3 matrix: off by up to inf; entry [0] is inf, want 1.",
    ),
    "in place": (
        in_place,
        "not right yet. Your function changes its input in place; "
        "work on a copy (`x = x.clone()`).",
    ),
    "raises": (
        raises,
        "not right yet. Your function raised IndexError at line "
        f"{raises.__code__.co_firstlineno + 2} of its cell: "
        "index 7 is out of bounds for dimension 0 with size 2",
    ),
    "many lines": (
        many_lines,
        "not right yet. Your function raised ValueError at line "
        f"{many_lines.__code__.co_firstlineno + 1} of its cell: first",
    ),
    "not a function": (
        None,
        "not right yet. Give the check your function itself; it got a NoneType.",
    ),
    "called": (
        torch.zeros(2),
        "not right yet. Give the check your function itself; it got a Tensor.",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_message(name, capsys):
    answer, want = WRONG[name]
    _, exercise = make()
    assert exercise(answer) is None
    assert capsys.readouterr().out == f"Exercise 3 (row means): {want}\n"


def test_torch_not_implemented_is_an_error_not_a_stub(capsys):
    def answer(x):
        raise NotImplementedError("no kernel for this dtype")

    _, exercise = make()
    exercise(answer)
    assert "raised NotImplementedError" in capsys.readouterr().out


def test_the_argument_of_every_case_is_fresh(capsys):
    _, exercise = make()
    exercise(in_place)
    exercise(row_means)
    assert capsys.readouterr().out.endswith("right.\n")


def test_a_later_case_counts(capsys):
    cases = {"zeros": (torch.zeros(2, 2),), "ones": (torch.ones(2, 2),)}
    _, exercise = make(cases=lambda: cases)
    exercise(lambda x: torch.zeros(2))
    assert "For ones: off by up to 1" in capsys.readouterr().out


def test_run_turns_a_hook_into_a_tensor(capsys):
    def zero_first(z, hook):
        z[:, 0] = 0
        return z

    def run(answer, x):
        return answer(x.clone(), hook=None)

    mistakes = {"You zeroed every head, not one.": lambda z, hook: z * 0}
    _, exercise = make(reference=zero_first, run=run, mistakes=mistakes)
    exercise(zero_first)
    exercise(lambda z, hook: torch.zeros_like(z))
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(": right.")
    assert out[1].endswith("You zeroed every head, not one.")


def test_a_number_may_be_a_tensor_and_a_tensor_no_list(capsys):
    _, exercise = make(reference=lambda x: 1.5)
    exercise(lambda x: torch.tensor(1.5))
    exercise(lambda x: [1.5])
    out = capsys.readouterr().out.splitlines()
    assert out[0].endswith(": right.")
    assert out[1].endswith("got a list, want a tensor of shape [].")


def test_inputs_of_any_kind_must_stay_as_they_are(capsys):
    def answer(x, at):
        at["S2"] = [0, 1]
        return x.mean()

    case = (torch.ones(2), {"S2": torch.tensor([1, 0])})
    mistakes = {"You forgot the mean.": lambda x, at: x}
    _, exercise = make(
        reference=lambda x, at: x.mean(), cases=lambda: {"a": case}, mistakes=mistakes
    )
    exercise(answer)
    assert "changes its input in place" in capsys.readouterr().out


def test_progress(capsys):
    registry, exercise = make()
    registry.add(
        number=1,
        title="another",
        reference=row_means,
        cases=exercise.cases,
        mistakes=exercise.mistakes,
    )
    exercise(row_means)
    capsys.readouterr()
    table = registry.progress()
    assert capsys.readouterr().out == "Exercises solved: 1 of 2.\n"
    assert list(table.index) == [1, 3]
    assert list(table["state"]) == ["not attempted yet", "right"]


def test_problems_names_a_mistake_that_equals_the_reference():
    mistakes = {"You did wrong.": lambda x: x.sum(1) / 3}
    _, exercise = make(mistakes=mistakes)
    assert "'You did wrong.'" in exercise.problems()[0]


def test_problems_names_a_reference_that_changes_its_input():
    _, exercise = make(reference=in_place)
    assert "reference does not pass" in exercise.problems()[0]


def test_problems_names_an_exercise_without_cases():
    _, exercise = make(cases=dict)
    assert "no cases" in exercise.problems()[0]


def test_bad_registrations():
    registry, _ = make()
    with pytest.raises(ValueError, match="number: 3 is already taken"):
        registry.add(number=3, title="", reference=row_means, cases=dict, mistakes={"a": ()})
    with pytest.raises(ValueError, match="mistakes: "):
        registry.add(number=4, title="", reference=row_means, cases=dict, mistakes={})


@pytest.mark.parametrize("exercise", ALL, ids=str)
def test_every_mistake_is_told_by_its_own_message(exercise):
    assert exercise.problems() == []
    assert len(exercise.mistakes) >= 3


@pytest.mark.parametrize("registry", REGISTRIES)
def test_exercises_are_numbered_without_gaps(registry):
    assert sorted(registry.all) == list(range(1, len(registry.all) + 1))
