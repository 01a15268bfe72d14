"""The exercises, answered as learners would: right in many styles, wrong in ways nobody listed."""

import answers_induction
import answers_ioi
import pytest

import induction_exercises
import ioi_exercises
from utils.exercises.exercise import Stretch
from utils.heads import Head
from utils.prompts import repeated_tokens
from utils.toy import LONGEST, build_toy

BOTH = ((induction_exercises, answers_induction), (ioi_exercises, answers_ioi))
CHECKS = [
    (getattr(checks, name), answers)
    for checks, file in BOTH
    for name, answers in file.RIGHT.items()
]
RIGHT = [(check, answer) for check, answers in CHECKS for answer in answers]
WRONG = [
    (getattr(checks, name), answer, text)
    for checks, file in BOTH
    for name, answer, text in file.WRONG
]


def name(part):
    """The same in every process, without addresses."""
    return getattr(getattr(part, "func", part), "__name__", str(part))


@pytest.mark.parametrize(("check", "answer"), RIGHT, ids=name)
def test_right_answers_are_right(check, answer, capsys, no_grad):
    check(answer)
    assert capsys.readouterr().out.endswith(f"{check}: right. Yours is used below.\n")


@pytest.mark.parametrize(("check", "answer", "text"), WRONG, ids=name)
def test_other_wrong_answers_are_told_what_is_wrong(check, answer, text, capsys, no_grad):
    check(answer)
    said = capsys.readouterr().out
    assert f"{check}: not right yet. " in said
    assert text in said


@pytest.mark.parametrize("check", [check for check, _ in CHECKS], ids=str)
def test_a_forgotten_return_is_told(check, capsys, no_grad):
    check(lambda *args: None)
    said = capsys.readouterr().out
    assert "not right yet" in said and "return" in said


@pytest.mark.parametrize(("checks", "file"), BOTH)
def test_every_exercise_is_answered(checks, file):
    exercises = {e.name for e in checks.EXERCISES.all.values() if not isinstance(e, Stretch)}
    assert exercises == set(file.RIGHT) == {check for check, *_ in file.WRONG}
    assert min(map(len, file.RIGHT.values())) >= 5


def pairs_in(value):
    """The tuples of two integers in an argument, which can only be heads."""
    if isinstance(value, tuple) and [type(x) for x in value] == [int, int]:
        return [value]
    return [p for x in value for p in pairs_in(x)] if isinstance(value, (list, tuple)) else []


@pytest.mark.parametrize("check", [check for check, _ in CHECKS], ids=str)
def test_heads_come_as_heads(check):
    """An answer may ask for `head.layer`, as the cells around it do."""
    assert all(isinstance(p, Head) for args in check._inputs.values() for p in pairs_in(args))


def test_weights_that_give_no_loss_are_told(capsys, no_grad):
    model = build_toy(2)
    model.enable_compatibility_mode()
    induction_exercises.use_toy((model, repeated_tokens(model, 4, LONGEST)))

    def change_weights(model, rescue):
        model.blocks[1].attn.W_O[0].fill_(float("nan"))

    induction_exercises.change_weights(change_weights)
    assert "a loss that is not a number" in capsys.readouterr().out
    assert model.W_O.isfinite().all()  # and what was changed is undone
