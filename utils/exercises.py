"""Exercises that say "right", "not attempted yet", or what exactly is wrong.

A notebook's exercises stand beside it, in `<project>/<notebook>_exercises.py`:

    EXERCISES = Exercises()

    induction_score = EXERCISES.add(
        number=2,
        title="induction score",
        reference=heads.induction_score,                # the right answer
        cases=lambda: {"1 + 2 x 5 tokens": (pattern, 5)},  # label -> arguments
        mistakes={                                      # what to tell -> a function that errs so
            "You look at the copied token itself, ...": lambda pattern, seq_len: ...,
        },
    )

In the notebook a stub cell (`raise NotImplementedError()`) is followed by a check cell:

    checks.induction_score(induction_score)

It prints one line and never raises. Where the answer is a hook, `run(answer, *args)` makes it a
tensor (see `run_hook`); reference and mistakes go through `run` too. A mistake whose output equals
the right one would condemn right answers: `Exercise.problems()` lists such slips.
"""

import traceback
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from numbers import Number

import pandas as pd
import torch
from torch import Tensor

RIGHT, WRONG, UNTRIED = "right", "not right yet", "not attempted yet"


def run_hook(answer: Callable, activation: Tensor, *args: object) -> Tensor:
    """The activation after the learner's hook, as a `run` of exercises that ask for one.

    TransformerLens takes a hook without `return` as one that edits in place.
    """
    edited = activation.clone()
    returned = answer(edited, None, *args)
    return edited if returned is None else returned


def set_at(activation: Tensor, index: tuple, value: object) -> Tensor:
    """A copy of the activation with `value` at `index`."""
    activation = activation.clone()
    activation[index] = value
    return activation


class _NotRight(Exception):
    """Carries the sentence that tells the learner what is wrong."""


@dataclass(eq=False)
class Exercise:
    """One exercise; its answer is a tensor or a number."""

    number: int
    title: str
    reference: Callable
    cases: Callable[[], Mapping[str, tuple]]  # built when first needed
    mistakes: Mapping[str, Callable]
    run: Callable | None = None
    state: str = UNTRIED

    def __call__(self, answer: Callable) -> None:
        """Print one line: right, not attempted yet, or not right yet and why. Never raises."""
        try:
            reason = self._what_is_wrong(answer)
            self.state = RIGHT if reason is None else WRONG
        except NotImplementedError:
            reason, self.state = None, UNTRIED
        print(f"{self}: {self.state}." + (f" {reason}" if reason else ""))

    def __str__(self) -> str:
        return f"Exercise {self.number} ({self.title})"

    def problems(self) -> list[str]:
        """What is wrong with the exercise itself (for tests): every mistake must be told apart."""
        try:
            found = [] if self._wanted else [f"{self}: no cases"]
        except Exception as error:
            return [f"{self}: the reference does not pass: {error}"]
        for message, wrong in self.mistakes.items():
            told = self._what_is_wrong(wrong)
            if told != message:
                found.append(f"{self}: mistake {message!r} is told {told!r}")
        return found

    @cached_property
    def _inputs(self) -> dict[str, tuple]:
        return dict(self.cases())

    @cached_property
    def _wanted(self) -> dict[str, object]:
        return self._outputs(self.reference)

    def _outputs(self, answer: Callable) -> dict[str, object]:
        """The answer's output on a copy of each case. Raises _NotRight if it changed the copy."""
        outputs = {}
        for label, args in self._inputs.items():
            copy = deepcopy(args)
            outputs[label] = self.run(answer, *copy) if self.run else answer(*copy)
            try:
                torch.testing.assert_close(copy, args, rtol=0, atol=0, equal_nan=True)
            except (AssertionError, TypeError):
                raise _NotRight(
                    "Your function changes its input in place; work on a copy (`x = x.clone()`)."
                ) from None
        return outputs

    def _what_is_wrong(self, answer: Callable) -> str | None:
        """In words, or None if it is right. Raises NotImplementedError for an untouched stub."""
        if not callable(answer):
            return f"Give the check your function itself; it got {_kind(answer)}."
        try:
            outputs = self._outputs(answer)
        except _NotRight as slip:
            return str(slip)
        except Exception as error:
            # torch raises NotImplementedError too, but with a text; the stub has none.
            if isinstance(error, NotImplementedError) and not str(error):
                raise
            return _describe_error(error, answer)
        differences = _differences(outputs, self._wanted)
        if not differences:
            return None
        if all(output is None for output in outputs.values()):
            return "Your function returned None: did you forget `return`?"
        for message, wrong in self.mistakes.items():
            try:
                same = not _differences(outputs, self._outputs(wrong))
            except Exception:  # a mistake that fails on a case cannot be what the learner has
                continue
            if same:
                return message
        label, text = next(iter(differences.items()))
        return f"For {label}: {text}."


class Exercises:
    """The exercises of one notebook."""

    def __init__(self) -> None:
        self.all: dict[int, Exercise] = {}

    def add(self, **fields: object) -> Exercise:
        """Register an `Exercise`. Raises ValueError for a number already taken or no mistakes."""
        exercise = Exercise(**fields)
        if exercise.number in self.all:
            raise ValueError(f"number: {exercise.number} is already taken")
        if not exercise.mistakes:
            raise ValueError(f"mistakes: {exercise} has none, want at least one")
        self.all[exercise.number] = exercise
        return exercise

    def progress(self) -> pd.DataFrame:
        """Print how many exercises are solved and return the table (number, title, state)."""
        ordered = [self.all[n] for n in sorted(self.all)]
        solved = sum(e.state == RIGHT for e in ordered)
        print(f"Exercises solved: {solved} of {len(ordered)}.")
        rows = [(e.number, e.title, e.state) for e in ordered]
        return pd.DataFrame(rows, columns=["exercise", "title", "state"]).set_index("exercise")


def _describe_error(error: Exception, answer: Callable) -> str:
    """Type and first line of the error, and the line of the learner's cell it came from."""
    source = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
    where = f" at line {lines[-1]} of its cell" if lines else ""
    text = str(error).strip().split("\n")[0][:200]
    return f"Your function raised {type(error).__name__}{where}: {text}"


def _differences(got: Mapping[str, object], want: Mapping[str, object]) -> dict[str, str]:
    """Case -> in what the two differ, in words, where they do."""
    found = {label: _difference(got[label], torch.as_tensor(want[label])) for label in want}
    return {label: text for label, text in found.items() if text}


def _difference(got: object, want: Tensor) -> str | None:
    """In what `got` differs from `want`, in words, or None."""
    if got is None:
        return "got None: did you forget `return`?"
    if isinstance(got, Number) and want.ndim == 0:
        got = torch.as_tensor(got)
    if not isinstance(got, Tensor):
        return f"got {_kind(got)}, want a tensor of shape {list(want.shape)}"
    if got.shape != want.shape:
        return f"got shape {list(got.shape)}, want {list(want.shape)}"
    if got.is_complex() != want.is_complex():
        return f"got numbers of type {got.dtype}, want {want.dtype}"
    got, want = got.detach().cpu(), want.detach().cpu()
    if not want.is_complex():
        got, want = got.double(), want.double()
    nans = int((got.isnan() & ~want.isnan()).sum())
    if nans:
        return f"{nans} of {got.numel()} values are NaN"
    if torch.allclose(got, want, rtol=1e-3, atol=1e-4, equal_nan=True):
        return None
    gap = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(posinf=torch.inf)
    worst = int(gap.argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape)]
    entry = f"entry {at} is" if at else "got"
    return (
        f"off by up to {gap.flatten()[worst]:.3g}; {entry} "
        f"{got.flatten()[worst]:.4g}, want {want.flatten()[worst]:.4g}"
    )


def _kind(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
