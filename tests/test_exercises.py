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


SAID = {  # answer: what is said after "not right yet. "
    "mistake": (lambda x: x.T.mean(dim=1), "You averaged over rows, not columns."),
    "none": (lambda x: None, "Your function returned None: did you forget `return`?"),
    "type": (lambda x: [1, 2], "For a 2 x 3 matrix: got a list, want a tensor of shape [2]."),
    "shape": (lambda x: x, "For a 2 x 3 matrix: got shape [2, 3], want [2]."),
    "value": (
        lambda x: row_means(x) + torch.tensor([0.0, 2.0]),
        "For a 2 x 3 matrix: off by up to 2; entry [1] is 6, want 4.",
    ),
    "nan": (lambda x: row_means(x) / 0 * 0, "For a 2 x 3 matrix: 2 of 2 values are NaN."),
    "infinite": (
        lambda x: row_means(x) / 0,
        "For a 2 x 3 matrix: off by up to inf; entry [0] is inf, want 1.",
    ),
    "in place": (
        in_place,
        "Your function changes its input in place; work on a copy (`x = x.clone()`).",
    ),
    "raises": (
        raises,
        f"Your function raised IndexError at line {raises.__code__.co_firstlineno + 2} of its "
        "cell: index 7 is out of bounds for dimension 0 with size 2",
    ),
    "many lines": (
        many_lines,
        f"Your function raised ValueError at line {many_lines.__code__.co_firstlineno + 1} of its "
        "cell: first",
    ),
    "not a function": (None, "Give the check your function itself; it got a NoneType."),
    "called": (torch.zeros(2), "Give the check your function itself; it got a Tensor."),
}


def line(capsys, answer, **changes):
    """What the check prints about an answer, without the exercise's name."""
    _, exercise = make(**changes)
    assert exercise(answer) is None
    return capsys.readouterr().out.removeprefix("Exercise 3 (row means): ")


@pytest.mark.parametrize("name", SAID)
def test_message(name, capsys):
    answer, text = SAID[name]
    assert line(capsys, answer) == f"not right yet. {text}\n"


def test_right_and_untried(capsys):
    assert line(capsys, row_means) == "right.\n"
    assert line(capsys, lambda x: row_means(x) + 1e-6) == "right.\n"  # float error
    assert line(capsys, stub) == "not attempted yet.\n"


def test_torch_not_implemented_is_an_error_not_a_stub(capsys):
    def answer(x):
        raise NotImplementedError("no kernel for this dtype")

    assert "raised NotImplementedError" in line(capsys, answer)


def test_the_argument_of_every_case_is_fresh(capsys):
    _, exercise = make()
    exercise(in_place)
    exercise(row_means)
    assert capsys.readouterr().out.endswith("right.\n")


def test_a_later_case_counts(capsys):
    cases = {"zeros": (torch.zeros(2, 2),), "ones": (torch.ones(2, 2),)}
    said = line(capsys, lambda x: torch.zeros(2), cases=lambda: cases)
    assert "For ones: off by up to 1" in said


def test_a_number_may_be_a_tensor_and_no_list(capsys):
    assert line(capsys, lambda x: torch.tensor(1.5), reference=lambda x: 1.5) == "right.\n"
    said = line(capsys, lambda x: [1.5], reference=lambda x: 1.5)
    assert said.endswith("got a list, want a tensor of shape [].\n")


def test_inputs_inside_a_dict_must_stay_as_they_are(capsys):
    def answer(at):
        at["S2"] = [0, 1]
        return 1.5

    cases = {"a": ({"S2": torch.tensor([1, 0])},)}
    said = line(capsys, answer, reference=lambda at: 1.5, cases=lambda: cases)
    assert "changes its input in place" in said


def test_progress(capsys):
    registry, exercise = make()
    registry.add(
        number=1, title="another", reference=row_means, cases=dict, mistakes=exercise.mistakes
    )
    exercise(row_means)
    capsys.readouterr()
    table = registry.progress()
    assert capsys.readouterr().out == "Exercises solved: 1 of 2.\n"
    assert list(table.index) == [1, 3]
    assert list(table["state"]) == ["not attempted yet", "right"]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mistakes": {"You did wrong.": lambda x: x.sum(1) / 3}}, "mistake 'You did wrong.'"),
        ({"reference": in_place}, "reference does not pass"),
        ({"cases": dict}, "no cases"),
    ],
)
def test_problems_names_a_slip_in_the_exercise_itself(changes, text):
    _, exercise = make(**changes)
    assert text in exercise.problems()[0]


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
