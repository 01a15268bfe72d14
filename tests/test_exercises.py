"""The exercise machinery: what a check says, what it gives back, and that nothing breaks it."""

import importlib
import sys
import time
import types
from decimal import Decimal
from fractions import Fraction

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from utils.exercises import learner
from utils.exercises.exercise import Exercises, Stretch, hook_point, run_hook
from utils.session import ROOT
from utils.toy import tiny_model

NAMES = sorted(path.stem for path in ROOT.glob("project-*/*_exercises.py"))
MODULES = [importlib.import_module(name) for name in NAMES]
ALL = [exercise for module in MODULES for exercise in module.EXERCISES.all.values()]
OURS, YOURS = "The library's is used below.\n", "Yours is used below.\n"


def row_means(x: Float[Tensor, "row col"]) -> Float[Tensor, "row"]:
    return x.mean(dim=1)


def make(**changes):
    registry = Exercises()
    fields = dict(number=3, name="row_means", title="row means", part="A1", reference=row_means)
    fields["cases"] = lambda: {"a 2 x 3 matrix": (torch.arange(6.0).reshape(2, 3),)}
    fields["mistakes"] = {"You averaged over rows, not columns.": lambda x: x.mean(dim=0)}
    return registry, registry.add(**(fields | changes))


def line(capsys, answer, **changes):
    """What the check prints about an answer, without the exercise's name."""
    _, exercise = make(**changes)
    assert callable(exercise(answer))
    return capsys.readouterr().out.removeprefix("Exercise 3 (row means): ")


def raises(x):
    y = x + 1
    return y[7]


def in_place(x):
    x -= x.mean(dim=1, keepdim=True)
    return x[:, 0]


def stub(x, *why):
    raise NotImplementedError(*why)


def ends(x):
    sys.exit(1)


def recurses(x):
    return recurses(x)


def raised(kind, answer, at, text):
    at += answer.__code__.co_firstlineno
    return f"Your function raised {kind} at line {at} of its cell: {text}."


CASE = "For a 2 x 3 matrix:"
SAID = [  # answer, how what is said after "not right yet. " begins
    (lambda x: x.T.mean(dim=1), "You averaged over rows, not columns."),
    (lambda x: None, "You return None: did you forget `return`?"),
    (lambda x: [1, 2], f"{CASE} You return a list; wanted is a tensor of shape [2] [row]."),
    (lambda x: [x, x], f"{CASE} You return a list; wanted is a tensor of shape [2] [row]."),
    (lambda x: x[:, :1] * 5, f"{CASE} Your result has shape [2, 1], wanted is a tensor of"),
    (
        lambda x: row_means(x) + x[:, 0] ** 2,
        f"{CASE} Off by up to 9: entry [1] is 13, wanted is 4.",
    ),
    (in_place, "Your function changes its input `x` in place; work on a copy (`x = x.clone()`)."),
    (
        raises,
        raised("IndexError", raises, 2, "index 7 is out of bounds for dimension 0 with size 2"),
    ),
    (ends, raised("SystemExit", ends, 1, "1")),
    (recurses, "Your function raised RecursionError at line"),
    (None, "The check wants your function itself; it got a NoneType."),
    (torch.zeros(2), "The check wants your function itself; it got a Tensor."),
    (int, "The check wants your function itself; it got a type."),
]


@pytest.mark.parametrize(("answer", "text"), SAID)
def test_message(answer, text, capsys):
    said = line(capsys, answer)
    assert said.startswith(f"not right yet. {text}")
    assert said.endswith(f". {OURS}") or said.endswith(f"? {OURS}")


def test_right_and_untried(capsys):
    assert line(capsys, row_means) == f"right. {YOURS}"
    assert line(capsys, lambda x: row_means(x.double()) + 1e-6) == f"right. {YOURS}"
    assert line(capsys, stub) == f"not attempted yet. {OURS}"
    assert "raised NotImplementedError" in line(capsys, lambda x: stub(x, "no kernel for this"))


def test_cases_that_are_right_are_named_before_one_that_is_not(capsys):
    cases = {"zeros": (torch.zeros(2, 3),), "cubes": (torch.arange(6.0).reshape(2, 3) ** 3,)}
    said = line(capsys, lambda x: x[:, 1], cases=lambda: cases)
    assert said.startswith("not right yet. Right for zeros. For cubes: Off by up to")


def test_parts_of_a_result_are_told_apart(capsys):
    def both(x):
        return {"sum": x.sum(), "rows": row_means(x)}

    said = line(capsys, lambda x: both(x) | {"sum": -x.sum()}, reference=both)
    assert "Right for a 2 x 3 matrix, rows. For a 2 x 3 matrix, sum: Your signs are" in said
    assert "rows: this part is missing" in line(capsys, lambda x: {"sum": x.sum()}, reference=both)
    assert "this part is missing; you return a Tensor" in line(capsys, row_means, reference=both)
    pair = dict(reference=lambda x: (x.sum(), row_means(x)))
    assert "matrix, result 2 of 2: Your signs" in line(
        capsys, lambda x: (x.sum(), -row_means(x)), **pair
    )
    assert line(capsys, lambda x: [x.sum(), row_means(x)], **pair) == f"right. {YOURS}"


def test_single_numbers_are_judged_together(capsys):
    def share(a: float, b: float) -> float:
        return a / b

    cases = {"a": (1.0, 2.0), "b": (3.0, 2.0), "c": (-2.0, 5.0)}
    parts = dict(reference=share, cases=lambda: cases)
    assert "You return absolute values" in line(capsys, lambda a, b: abs(a / b), **parts)
    assert "cut values above one" in line(capsys, lambda a, b: min(a / b, 1.0), **parts)
    assert "2 times too large" in line(capsys, lambda a, b: 2 * a / b, **parts)
    assert "For a: Off by up to 1.5: it is -1" in line(capsys, lambda a, b: a - b, **parts)
    for kind in (torch.tensor, Fraction, Decimal):
        assert line(capsys, lambda a, b, kind=kind: kind(a / b), **parts) == f"right. {YOURS}"
    rows = {name: (k * torch.arange(4.0),) for name, k in (("a", 1), ("b", 2), ("c", 3))}
    parts = dict(reference=lambda x: 2 * x, cases=lambda: rows, mistakes={})
    said = line(capsys, lambda x: x.mean(), **parts)
    assert "For a: Your result has shape [], wanted is a tensor of shape [4]" in said


# What a check gives back


def test_a_right_answer_is_given_back_and_fitted(capsys):
    _, exercise = make()
    yours = exercise(lambda x: x.double().sum(1) / x.shape[1])
    got = yours(torch.ones(4, 5))
    assert (got.dtype, yours.__name__) == (torch.float32, "row_means")
    assert torch.equal(got, torch.ones(4))
    _, exercise = make(reference=lambda x: 0.5)
    assert exercise(lambda x: torch.tensor(0.5))(1).item() == 0.5


@pytest.mark.parametrize(
    ("fails", "text"),
    [
        (lambda x: x, "Your function gives [4, 4], wanted is [row]."),
        (lambda x: 1 / 0, "Your function raised ZeroDivisionError"),
        (ends, "Your function raised SystemExit"),
        (lambda x: x[:1, 0], "Your function gives [1], wanted is [row]."),
    ],
)
def test_an_answer_that_fails_later_is_replaced_once(fails, text, capsys):
    yours = make()[1](lambda x: fails(x) if len(x) == 4 else row_means(x))
    capsys.readouterr()
    for _ in range(2):
        assert torch.equal(yours(torch.ones(4, 4)), torch.ones(4))
    said = capsys.readouterr().out
    assert said.startswith(f"Exercise 3 (row means): {text}")
    assert said.count("takes over") == 1 == said.count("\n")


@pytest.mark.parametrize("answer", [stub, raises, lambda x: x, None, ends])
def test_the_library_is_given_back_until_an_answer_is_right(answer):
    given = make()[1](answer)
    assert torch.equal(given(torch.ones(4, 5)), torch.ones(4))
    assert given.__name__ == "row_means"


def test_what_an_earlier_run_of_the_cell_gave_is_no_answer(capsys):
    _, exercise = make()
    given = exercise(stub)
    exercise(lambda x: given(x))
    assert "Your function calls `row_means`, which is what you are to write." in (
        capsys.readouterr().out
    )
    exercise(row_means)
    assert capsys.readouterr().out.endswith(f"right. {YOURS}")


def test_solved_is_solved_though_a_later_try_is_wrong(capsys):
    exercises, exercise = make()
    exercise(row_means)
    exercise(lambda x: x.sum(1))
    assert "not right yet" in capsys.readouterr().out
    assert list(exercises.progress()["state"]) == ["right"]


# Nothing breaks the notebook


def test_what_a_judge_runs_itself_is_not_held_against_the_answer(monkeypatch, capsys):
    monkeypatch.setattr("utils.exercises.exercise.CHECK_SECONDS", 0.2)
    exercises = Exercises()

    def judge(answer):
        found = answer()
        time.sleep(0.5)
        return None if found else "nothing found"

    stretch = exercises.stretch(number=1, name="find", title="find", part="1", judge=judge)
    stretch(lambda: True)
    assert capsys.readouterr().out.endswith("right.\n")
    stretch(lambda: time.sleep(5))
    assert "ran too long" in capsys.readouterr().out


def test_a_function_that_runs_too_long_is_ended(monkeypatch, capsys):
    monkeypatch.setattr("utils.exercises.exercise.CHECK_SECONDS", 0.2)
    monkeypatch.setattr("utils.exercises.used.USE_SECONDS", 0.2)

    def swallows(x):
        while len(x) != 2:
            try:
                time.sleep(0.01)
            except:  # noqa: E722
                continue
        return row_means(x)

    def sleeps(x):
        time.sleep(30)

    began = time.monotonic()
    assert "ran too long and was ended at line" in line(capsys, sleeps)
    _, exercise = make()
    yours = exercise(lambda x: sleeps(x) if len(x) == 4 else row_means(x))
    assert torch.equal(yours(torch.ones(4, 2)), torch.ones(4))
    assert "ran too long" in capsys.readouterr().out
    assert time.monotonic() - began < 20


def test_an_outer_limit_goes_on_after_an_inner_one():
    began = time.monotonic()
    with pytest.raises(learner.Overrun), learner.contained(0.3):
        with learner.contained(30):
            pass
        time.sleep(30)
    assert time.monotonic() - began < 20


def test_printing_is_shown_but_not_without_end(capsys):
    def prints(x):
        for i in range(10**5):
            print("step", i)
        return row_means(x)

    said = line(capsys, prints)
    assert "step 0\nstep 1\n" in said and len(said) < 1300
    assert "what else your function prints is not shown" in said
    assert said.endswith(f"right. {YOURS}")


def test_global_state_is_put_back():
    def meddles(x):
        torch.manual_seed(5)
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(not torch.is_grad_enabled())
        return row_means(x)

    before = (torch.get_rng_state(), torch.is_grad_enabled(), torch.get_default_dtype())
    make()[1](meddles)(torch.ones(3, 3))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (torch.is_grad_enabled(), torch.get_default_dtype()) == before[1:]


def test_a_model_in_a_case_is_put_back(no_grad, capsys):
    def logits_of(model, tokens):
        return model(tokens)

    model, tokens = tiny_model(), torch.arange(6).reshape(2, 3)
    usual = model(tokens)
    parts = dict(reference=logits_of, cases=lambda: {"a model": (model, tokens)})

    def leaves_hooks(model, tokens):
        model.add_hook("blocks.0.attn.hook_z", lambda z, hook: z * 0)
        return model(tokens)

    def changes_weights(model, tokens):
        next(iter(model.original_model.parameters())).zero_()
        return model(tokens)

    assert "leaves hooks on the model" in line(capsys, leaves_hooks, **parts)
    assert "changes the model's weights" in line(capsys, changes_weights, **parts)
    assert torch.equal(model(tokens), usual)
    assert line(capsys, logits_of, **parts) == f"right. {YOURS}"


def test_hooks_get_a_hook_point(capsys):
    z = torch.randn(2, 4, 3, 5)

    def first_head(
        z: Float[Tensor, "prompt pos head d"], hook
    ) -> Float[Tensor, "prompt pos head d"]:
        return torch.cat([torch.zeros_like(z[:, :, :1]), z[:, :, 1:]], dim=2)

    def asks(z, hook):
        assert hook.name == "blocks.2.attn.hook_z" and hook.layer() == 2
        z[:, :, 0] = 0

    cases = {"one layer": (z, hook_point(2))}
    parts = dict(reference=first_head, cases=lambda: cases, run=run_hook)
    assert line(capsys, asks, **parts) == f"right. {YOURS}"
    _, exercise = make(**parts)
    yours = exercise(asks)
    again = z.clone()
    assert yours(again, hook_point(2)) is None and not again[:, :, 0].any()
    assert "one layer: Right but for head 0" in line(capsys, lambda z, hook: z, **parts)


@pytest.fixture
def shell(monkeypatch):
    from IPython.core.interactiveshell import InteractiveShell

    shell = InteractiveShell.instance()
    _, exercise = make()
    shell.user_ns |= {
        "tokens": 5,
        "checks": types.SimpleNamespace(row_means=exercise),
        "torch": torch,
    }
    yield shell
    InteractiveShell.clear_instance()


GOOD = "@checks.row_means\ndef row_means(x):\n    return x.mean(1)"


@pytest.mark.parametrize(
    ("cell", "said"),
    [
        (f"tokens = 7\n{GOOD}", "The notebook uses `tokens` itself: it keeps its value"),
        (f"del tokens\n{GOOD}", "The notebook uses `tokens` itself"),
        (f"1 / 0\n{GOOD}", ""),
        (f"{GOOD}\n)", ""),
        (f"{GOOD}\nrow_means = None", ""),
        (f"scratch = 1\n{GOOD}", ""),
    ],
)
def test_a_learners_cell_leaves_the_notebooks_names(cell, said, shell, capsys):
    shell.run_cell(cell)
    assert said in capsys.readouterr().out
    assert shell.user_ns["tokens"] == 5
    assert shell.user_ns["row_means"](torch.ones(2, 3)).tolist() == [1, 1]
    shell.run_cell("tokens = 8")  # the notebook's own cells do as they like
    assert shell.user_ns["tokens"] == 8


# Predictions and progress


def test_predictions_are_noted_and_never_raise(capsys):
    registry = Exercises()
    registry.predict("Which?", ["this", "that"])
    assert capsys.readouterr().out.startswith(
        "Which?\n  a) this\n  b) that\nYour guess: write one of"
    )
    registry.predict("Which?", ["this", "that"], mine=" B")
    assert capsys.readouterr().out.endswith("Noted: b. Now look.\n")
    for mine in ("b)", "That", "b"):
        registry.predict("Which?", ["this", "that"], mine=mine)
        assert capsys.readouterr().out.endswith("Noted: b. Now look.\n")
    registry.predict("How much?", ["this", "that"], mine=1)
    assert "write a letter in quotes or the option's text, one of a, b" in capsys.readouterr().out
    for options, wrong in ((["this"], "c"), ([], "a"), (["this"], 3), ([], None)):
        registry.predict("How much?", options, mine=wrong)
        assert "Noted" not in capsys.readouterr().out
    registry.predict("How much?", mine=0.5)
    assert registry.guesses == {"Which?": "b", "How much?": 0.5}


def test_progress(capsys):
    registry, exercise = make()
    more = dict(title="another", part="A1", reference=row_means, cases=dict)
    registry.add(number=1, name="another", **more)
    registry.stretch(number=5, name="far", title="far", part="B", judge=lambda answer: None)
    registry.predict("How much?", mine=2)
    exercise(row_means)
    capsys.readouterr()
    table = registry.progress()
    assert capsys.readouterr().out == (
        "Exercises solved: 1 of 3.\nPredictions made: 1 of 1.\n"
        "Next: Exercise 1 (another), in part A1.\n"
    )
    assert list(table["state"]) == ["not attempted yet", "right", "not attempted yet"]
    assert list(table.index) == [("A1", 1), ("A1", 3), ("B", 5)]


def test_a_stretch_exercise_is_judged(capsys):
    registry = Exercises()
    judge = lambda answer: None if answer() > 3 else f"{answer()} is too little."  # noqa: E731
    exercise = registry.stretch(number=1, name="far", title="far", part="B", judge=judge)

    def far():
        return 4

    assert exercise(far) is far
    assert capsys.readouterr().out == "Exercise 1 (far): right.\n"
    exercise(lambda: 2)
    assert "not right yet. 2 is too little." in capsys.readouterr().out
    exercise(stub)
    exercise(lambda: stub(1))
    assert "not attempted yet" in capsys.readouterr().out


# The exercises themselves

SLIPS = [
    ({"mistakes": {"You did wrong.": lambda x: x.sum(1) / 3}}, "mistake 'You did wrong.'"),
    ({"reference": in_place}, "reference does not pass"),
    ({"cases": dict}, "no cases"),
]


def problems(exercise):
    """What is wrong with the exercise itself: every mistake must be told apart."""
    if isinstance(exercise, Stretch):  # there is nothing to compare with
        return []
    try:
        found = [] if exercise._wanted else [f"{exercise}: no cases"]
    except Exception as error:
        return [f"{exercise}: the reference does not pass: {error}"]
    for message, wrong in exercise._slips():
        told = exercise._what_is_wrong(wrong)
        if told != message:
            found.append(f"{exercise}: mistake {message!r} is told {told!r}")
    return found


@pytest.mark.parametrize(("changes", "text"), SLIPS)
def test_problems_names_a_slip_in_the_exercise_itself(changes, text):
    _, exercise = make(**changes)
    assert text in problems(exercise)[0]


def test_bad_registrations():
    (registry, _), parts = make(), dict(title="", part="", reference=row_means, cases=dict)
    with pytest.raises(ValueError, match="number: 3 is already taken"):
        registry.add(number=3, name="other", **parts)
    with pytest.raises(ValueError, match="name: 'row_means' is already taken"):
        registry.add(number=4, name="row_means", **parts)


@pytest.mark.parametrize("exercise", ALL, ids=str)
def test_every_mistake_is_told_by_its_own_message(exercise, no_grad):
    assert problems(exercise) == []
    assert len(exercise.mistakes) >= 3 or hasattr(exercise, "judge")


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_exercises_are_numbered_and_named(module):
    exercises = module.EXERCISES.all
    assert sorted(exercises) == list(range(1, len(exercises) + 1))
    assert all(getattr(module, exercise.name) is exercise for exercise in exercises.values())
