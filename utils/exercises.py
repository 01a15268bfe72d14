"""Exercises that say "right", "not attempted yet", or what exactly is wrong.

How to add one: in `utils/checks_<notebook>.py` keep one `Exercises()` and add to it.

    from utils.exercises import Exercises

    EXERCISES = Exercises()
    progress = EXERCISES.progress

    def _stripe_cases():
        pattern = torch.rand(2, 4, 7, 7, generator=torch.Generator().manual_seed(0))
        return {"2 prompts of 1 + 2 x 3 tokens": (pattern, 3)}

    induction_score = EXERCISES.add(
        number=3,
        title="induction score",
        reference=heads.induction_score,         # the right answer
        cases=_stripe_cases,                     # label -> arguments; built when first needed
        mistakes={                               # name -> (wrong function, what to tell)
            "off by one": (_stripe_one_late, "You look at the copied token itself, ..."),
        },
    )

In the notebook a stub cell (`raise NotImplementedError()`) is followed by a check cell:

    checks.induction_score(my_induction_score)

It prints one line and never raises. `checks.progress()` at the end prints how many are solved and
returns the table.

Where the answer is not a tensor (a hook, a list of hooks), `run(answer, *args)` turns it into one:

    def _run_with_hook(answer, tokens, layer, head):
        model = tiny_model()
        hook = functools.partial(answer, head=head)
        return model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{layer}.attn.hook_z", hook)])

    EXERCISES.add(..., run=_run_with_hook)

Reference and mistakes then go through `run` too, so they have the learner's signature. Answers may
be tensors, numbers, or lists, tuples and dicts of them. A mistake whose output equals the right one
on every case would condemn right answers: `Exercise.problems()` lists such slips and
`tests/test_exercises.py` fails on them.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
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


@dataclass
class Exercise:
    """One exercise; calling it with the learner's function checks that function."""

    number: int
    title: str
    reference: Callable
    cases: Callable[[], Mapping[str, tuple]]
    mistakes: Mapping[str, tuple[Callable, str]]
    run: Callable | None = None
    tolerance: float = 1e-4
    state: str = UNTRIED

    def __call__(self, answer: Callable) -> None:
        """Check `answer` and print one line; never raises (see `check`)."""
        check(self, answer)

    def __str__(self) -> str:
        return f"Exercise {self.number} ({self.title})"

    @cached_property
    def _inputs(self) -> dict[str, tuple]:
        return dict(self.cases())

    @cached_property
    def _wanted(self) -> dict[str, object]:
        return {label: self._call(self.reference, args) for label, args in self._inputs.items()}

    def _call(self, answer: Callable, args: tuple) -> object:
        """The answer on a copy of the arguments. Raises _NotRight if it changed them in place."""
        copy = _copy(args)
        result = answer(*copy) if self.run is None else self.run(answer, *copy)
        if not _unchanged(copy, args):
            raise _NotRight(
                "Your function changes its input in place; work on a copy (`x = x.clone()`)."
            )
        return result

    def _mistake(self, outputs: dict[str, object]) -> str | None:
        """The message of the known mistake that gives exactly these outputs."""
        for wrong, message in self.mistakes.values():
            try:
                same = all(
                    _difference(outputs[label], self._call(wrong, args), self.tolerance) is None
                    for label, args in self._inputs.items()
                )
            except Exception:  # a mistake that fails on a case cannot be what the learner has
                continue
            if same:
                return message
        return None

    def problems(self) -> list[str]:
        """What is wrong with the exercise itself (for tests): each mistake must be told apart."""
        try:
            found = [] if self._wanted else [f"{self}: no cases"]
        except Exception as error:
            return [f"{self}: the reference does not pass: {error}"]
        for name, (wrong, message) in self.mistakes.items():
            told = _judge(self, wrong)
            if told != message:
                found.append(f"{self}: mistake {name!r} is told {told!r}")
        return found


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


def check(exercise: Exercise, answer: Callable) -> None:
    """Print one line: right, not attempted yet, or not right yet and why. Never raises."""
    try:
        reason = _judge(exercise, answer)
        exercise.state = RIGHT if reason is None else WRONG
    except NotImplementedError:
        reason, exercise.state = "", UNTRIED
    text = f"{exercise}: {exercise.state}."
    print(f"{text} {reason}" if reason else text)


def _judge(exercise: Exercise, answer: Callable) -> str | None:
    """What is wrong with `answer`, or None. Raises NotImplementedError for an untouched stub."""
    if not callable(answer):
        return f"Give the check your function itself; it got {_kind(answer)}."
    try:
        outputs = {label: exercise._call(answer, args) for label, args in exercise._inputs.items()}
    except _NotRight as slip:
        return str(slip)
    except Exception as error:
        # torch raises NotImplementedError too, but with a text; the stub has none.
        if isinstance(error, NotImplementedError) and not str(error):
            raise
        return _describe_error(error, answer)
    differences = {
        label: _difference(outputs[label], want, exercise.tolerance)
        for label, want in exercise._wanted.items()
    }
    wrong = {label: text for label, text in differences.items() if text}
    if not wrong:
        return None
    if all(out is None for out in outputs.values()):
        return "Your function returned None: did you forget `return`?"
    label, text = next(iter(wrong.items()))
    return exercise._mistake(outputs) or f"For {label}: {text}."


def _describe_error(error: Exception, answer: Callable) -> str:
    """Type and first line of the error, and the line of the learner's cell it came from."""
    source = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == source]
    where = f" at line {lines[-1]} of its cell" if lines else ""
    text = (str(error).strip().splitlines() or [""])[0][:200]
    return f"Your function raised {type(error).__name__}{where}: {text}"


def _difference(got: object, want: object, tolerance: float) -> str | None:
    """In what `got` differs from `want`, in words, or None."""
    if isinstance(want, Tensor | Number):
        return _tensor_difference(got, torch.as_tensor(want), tolerance)
    if got is None:
        return "got None: did you forget `return`?"
    if isinstance(want, Mapping):
        if not isinstance(got, Mapping) or list(got) != list(want):
            keys = list(got) if isinstance(got, Mapping) else _kind(got)
            return f"got {keys}, want a dict with the keys {list(want)}"
        pairs = [(f"entry {key!r}", got[key], want[key]) for key in want]
    elif isinstance(want, list | tuple):
        if not isinstance(got, list | tuple):
            return f"got {_kind(got)}, want a {type(want).__name__} of {len(want)}"
        if len(got) != len(want):
            return f"got {len(got)} entries, want {len(want)}"
        pairs = [(f"entry {i}", g, w) for i, (g, w) in enumerate(zip(got, want, strict=True))]
    else:
        return None if got == want else f"got {got!r}, want {want!r}"
    for name, g, w in pairs:
        text = _difference(g, w, tolerance)
        if text:
            return f"{name}: {text}"
    return None


def _tensor_difference(got: object, want: Tensor, tolerance: float) -> str | None:
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
    if torch.allclose(got, want, rtol=1e-3, atol=tolerance, equal_nan=True):
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


def _copy(value: object) -> object:
    """Tensors cloned, lists, tuples and dicts walked; anything else (a model) as it is."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copy(v) for key, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_copy(v) for v in value)
    return value


def _unchanged(after: object, before: object) -> bool:
    if isinstance(before, Tensor):
        same = isinstance(after, Tensor) and after.shape == before.shape
        return same and torch.equal(after.nan_to_num(), before.nan_to_num())
    if isinstance(before, Mapping):
        return list(after) == list(before) and all(_unchanged(after[k], before[k]) for k in before)
    if type(before) in (list, tuple):
        pairs = zip(after, before, strict=False)
        return len(after) == len(before) and all(_unchanged(a, b) for a, b in pairs)
    return True
