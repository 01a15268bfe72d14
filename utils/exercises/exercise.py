"""Exercises: a learner's function is checked, and used from there on if it is right.

A notebook's exercises stand beside it, in `<project>/<notebook>_exercises.py`:

    EXERCISES = Exercises()

    induction_score = EXERCISES.add(
        number=2,
        name="induction_score",       # of the function to write, and of the check
        title="induction score",
        part="A1",
        reference=heads.induction_score,                   # the library's version
        cases=lambda: {"1 + 2 x 5 tokens": (pattern, 5)},  # label -> arguments
        mistakes={                   # what to tell -> a function that errs so, or a list of them
            "You look at the copied token itself, ...": lambda pattern, seq_len: ...,
        },
    )

In the notebook the check is a decorator on the stub, so that running the cell checks what it says:

    @checks.induction_score
    def induction_score(pattern, seq_len):
        raise NotImplementedError()

It prints one line, never raises, and gives back a function: the learner's if it is right, the
library's until then. Mistakes are told by name; what nobody listed, by `diagnosis`.
Where the answer is a hook, `run=run_hook` makes its output a tensor. A mistake whose output equals
the right one would condemn right answers: `tests/test_exercises.py` finds such slips.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import cached_property, wraps
from numbers import Number
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from utils.exercises.diagnosis import a_kind, difference, kind_of_slip, same
from utils.exercises.learner import NotRight, Overrun, Watched, contained, describe, keep_names
from utils.exercises.used import in_use

RIGHT, WRONG, UNTRIED = "right", "not right yet", "not attempted yet"
CHECK_SECONDS = 20
NUMBER, ARRAY = (Number, Tensor), (Tensor, np.ndarray)


def hook_point(layer: int = 0, site: str = "attn.hook_z") -> HookPoint:
    """A hook point with a name, as a hook gets it; `hook.layer()` works too."""
    point = HookPoint()
    point.name = f"blocks.{layer}.{site}"
    return point


def run_hook(answer: Callable, activation: Tensor, *args: object) -> Tensor:
    """The activation after the learner's hook, as a `run` of exercises that ask for one.

    TransformerLens takes a hook without `return` as one that edits in place.
    """
    edited = activation.clone()
    returned = answer(edited, *args)
    return edited if returned is None else returned


def set_at(activation: Tensor, index: tuple, value: object) -> Tensor:
    """A copy of the activation with `value` at `index`."""
    activation = activation.clone()
    activation[index] = value
    return activation


@dataclass(eq=False)
class Exercise:
    """One exercise; its answer is a tensor, a number, or a dict or tuple of them."""

    number: int
    name: str
    title: str
    part: str
    reference: Callable
    cases: Callable[[], Mapping[str, tuple]]  # built when first needed
    mistakes: Mapping[str, Callable | list[Callable]] = field(default_factory=dict)
    run: Callable | None = None
    state: str = UNTRIED  # the best so far
    used: ClassVar = (" The library's is used below.", " Yours is used below.")
    checking: bool = False
    slips: dict[tuple[Callable, str], dict] = field(default_factory=dict)  # of (mistake, case)

    def __call__(self, answer: Callable) -> Callable:
        """Print one line (right, not attempted yet, or what is wrong); never raises.

        Gives back the answer if it is right, to be used by the cells below; it changes to the
        library's version, with a sentence, if it fails there. Else the library's version.
        """
        try:
            reason = self._what_is_wrong(answer)
            state = RIGHT if reason is None else WRONG
        except NotImplementedError:
            reason, state = None, UNTRIED
        self.state = RIGHT if self.state == RIGHT else state  # solved is solved
        says = f" {reason}" if reason else ""
        print(f"{self}: {state}.{says}{self.used[state == RIGHT]}")
        if state != RIGHT:
            return self.library
        return self._named(in_use(answer, self.reference, str(self), self.run is run_hook))

    def __str__(self) -> str:
        return f"Exercise {self.number} ({self.title})"

    @cached_property
    def library(self) -> Callable:
        """The library's version, under the exercise's name."""
        return self._named(self.reference)

    def _named(self, function: Callable) -> Callable:
        """The function under the exercise's name.

        In a check it refuses: what an earlier run of the cell gave is no answer to this one.
        """

        @wraps(function)
        def named(*args: object, **kwargs: object) -> object:
            if self.checking:
                told = f"Your function calls `{self.name}`, which is what you are to write."
                raise NotRight(told)
            return function(*args, **kwargs)

        named.__name__, named.checked_by = self.name, self.name
        return named

    def _slips(self) -> Iterator[tuple[str, Callable]]:
        """What to tell, and a function that errs so, one at a time."""
        for message, wrong in self.mistakes.items():
            yield from ((message, one) for one in (wrong if isinstance(wrong, list) else [wrong]))

    def _is_this_mistake(self, wrong: Callable, outputs: Mapping[str, object]) -> bool:
        """Whether a mistake gives these outputs, case by case until one differs.

        Each case is run once; in one that a mistake fails on, no answer can be that mistake.
        """
        for label in self._inputs:
            if (wrong, label) not in self.slips:
                try:
                    with contained(CHECK_SECONDS):
                        self.slips[wrong, label] = self._judged_parts(wrong, label)
                except (Exception, Overrun):
                    self.slips[wrong, label] = {}
            given = self.slips[wrong, label]
            if not given or not all(same(outputs.get(at), value) for at, value in given.items()):
                return False
        return True

    @cached_property
    def _inputs(self) -> dict[str, tuple]:
        return dict(self.cases())

    @cached_property
    def _wanted(self) -> dict[str, Tensor]:
        """What the reference gives: case, or case and part -> tensor."""
        found: dict[str, object] = {}
        for label in self._inputs:
            found |= _parts(label, self._run_case(self.reference, label))
        return {label: torch.as_tensor(value).detach().cpu() for label, value in found.items()}

    @property
    def _axes(self) -> list[str]:
        """Names of the axes of what is compared, as `run` or else the reference is annotated."""
        for function in filter(None, (self.run, self.reference)):
            returns = inspect.signature(function).return_annotation
            if names := getattr(returns, "dim_str", "").split():
                return names
        return []

    def _judged_parts(self, answer: Callable, label: str) -> dict[str, object]:
        """What an answer gives in a case: label, or label and part -> tensor or number.

        It is taken apart only where the reference's output is: a list in place of a tensor is told.
        """
        output = self._run_case(answer, label)
        return {label: output} if label in self._wanted else _parts(label, output)

    def _run_case(self, answer: Callable, label: str) -> object:
        """What an answer gives on a copy of one case. Raises NotRight if it changed the copy."""
        args = self._inputs[label]
        models = [arg for arg in args if isinstance(arg, nn.Module) and hasattr(arg, "cfg")]
        modules = {id(a): a for a in args if isinstance(a, nn.Module)}
        copy, watched = deepcopy(args, modules), Watched(models)
        run = self.run or (lambda answer, *args: answer(*args))
        try:
            output = run(answer if run is run_hook else _returning(answer), *copy)
            output = output.detach() if isinstance(output, Tensor) else output
            output = float(output) if isinstance(output, (Decimal, Fraction)) else output
        finally:
            changed = watched.undo()
        if changed:
            raise NotRight(changed)
        names = [*inspect.signature(self.reference).parameters, *["x"] * len(args)]
        for name, after, before in zip(names, copy, args, strict=False):
            if not _unchanged(after, before):
                raise NotRight(
                    f"Your function changes its input `{name}` in place; work on a copy "
                    f"(`{name} = {name}.clone()`)."
                )
        return output

    def _what_is_wrong(self, answer: Callable) -> str | None:
        """In words, or None if it is right. Raises NotImplementedError for an untouched stub."""
        if not callable(answer) or isinstance(answer, type):
            return f"The check wants your function itself; it got {a_kind(answer)}."
        wanted, outputs = self._wanted, {}
        self.checking = True
        try:
            with contained(CHECK_SECONDS):
                for label in self._inputs:
                    outputs |= self._judged_parts(answer, label)
        except NotRight as slip:
            return str(slip)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            # torch raises NotImplementedError too, but with a text; the stub has none.
            if isinstance(error, NotImplementedError) and not str(error):
                raise
            return describe(error, answer)
        finally:
            self.checking = False
        differences = self._differences(outputs, wanted)
        if not differences:
            return None
        for message, wrong in self._slips():
            if self._is_this_mistake(wrong, outputs):
                return message
        numbers = {label: value for label, value in wanted.items() if not value.ndim}
        if differences.keys() <= numbers.keys() and (text := self._in_all_cases(outputs, numbers)):
            return text
        label, text = next(iter(differences.items()))
        right = [other for other in wanted if other not in differences]
        more = f" and {len(right) - 3} more" if len(right) > 3 else ""
        told = f"Right for {', '.join(right[:3])}{more}. " if right else ""
        return f"{told}For {label}: {text}"

    def _differences(self, got: Mapping[str, object], want: Mapping[str, object]) -> dict[str, str]:
        """Case (or part of one) -> in what the two differ, in words, where they do."""
        found = {}
        for label, value in want.items():
            if label not in got:
                whole = [
                    f"; you return {a_kind(x)}" for key, x in got.items() if label.startswith(key)
                ]
                found[label] = f"this part is missing{''.join(whole[:1])}."
                continue
            text = difference(got[label], torch.as_tensor(value), self._axes)
            if text:
                found[label] = text
        return found

    @staticmethod
    def _in_all_cases(got: Mapping[str, object], want: Mapping[str, Tensor]) -> str | None:
        """What was done to single numbers, in all cases alike: in one case it may be chance."""
        values = [torch.as_tensor(got[key]) for key in want if isinstance(got.get(key), NUMBER)]
        if len(values) < max(3, len(want)):
            return None
        if any(v.ndim or v.is_complex() for v in (*values, *want.values())):
            return None
        mine = torch.stack([v.detach().cpu().double() for v in values])
        wanted = torch.stack([value.double() for value in want.values()])
        return kind_of_slip(mine, wanted) if mine.isfinite().all() else None


@dataclass(eq=False)
class Stretch(Exercise):
    """An exercise with no one right answer: `judge` says what is missing, or None."""

    judge: Callable[[Callable], str | None] = lambda answer: None
    used: ClassVar = ("", "")

    def __call__(self, answer: Callable) -> Callable:
        """Print one line and give the answer back: nothing below uses it."""
        super().__call__(answer)
        return answer

    def _what_is_wrong(self, answer: Callable) -> str | None:
        @wraps(answer)
        def limited(*args: object) -> object:  # the time of the judge itself is not limited
            with contained(CHECK_SECONDS):
                return answer(*args)

        try:
            return self.judge(limited)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if isinstance(error, NotImplementedError) and not str(error):
                raise
            return describe(error, answer)


class Exercises:
    """The exercises of one notebook, and the guesses its reader makes."""

    def __init__(self) -> None:
        self.all: dict[int, Exercise] = {}
        self.guesses: dict[str, str | float | None] = {}
        keep_names(self._fallback)

    def add(self, **fields: object) -> Exercise:
        """Register an `Exercise`. Raises ValueError for a number or name already taken."""
        return self._added(Exercise(**fields))

    def stretch(self, **fields: object) -> Stretch:
        """Register a `Stretch` exercise. Raises ValueError for a number or name already taken."""
        nothing = dict(reference=lambda *_: None, cases=dict)
        return self._added(Stretch(**nothing, **fields))

    def _added(self, exercise: Exercise) -> Exercise:
        if exercise.number in self.all:
            raise ValueError(f"number: {exercise.number} is already taken")
        if self._fallback(exercise.name):
            raise ValueError(f"name: {exercise.name!r} is already taken")
        self.all[exercise.number] = exercise
        return exercise

    def _fallback(self, name: str) -> Callable | None:
        return next((e.library for e in self.all.values() if e.name == name), None)

    def predict(
        self, question: str, options: Sequence[str] = (), mine: str | float | None = None
    ) -> None:
        """Print the question and note the guess: a letter, or a number where there are no options.

        "b", "B", "b)" and the option's own text will do. Nothing depends on it, nothing is raised.
        """
        print(question)
        letters = "abcdefgh"[: len(options)]
        for letter, option in zip(letters, options, strict=True):
            print(f"  {letter}) {option}")
        wanted = f"one of {', '.join(letters)}" if options else "a number"
        self.guesses.setdefault(question, None)
        guess = mine.strip().lower() if isinstance(mine, str) else mine
        if options and isinstance(guess, str):
            texts = [option.strip().lower() for option in options]
            guess = letters[texts.index(guess)] if guess in texts else guess.rstrip(").: ")
        fits = guess in tuple(letters) if options else isinstance(guess, Number)
        if mine is None:
            print(f"Your guess: write {wanted} after `mine=` and run the cell again, then look.")
        elif fits:
            self.guesses[question] = guess
            print(f"Noted: {guess}. Now look.")
        else:
            written = "a letter in quotes or the option's text, " if options else ""
            print(f"mine={mine!r} is no guess: write {written}{wanted}.")

    def progress(self) -> pd.DataFrame:
        """Print what is solved, part by part, and what to try next; return the table."""
        ordered = [self.all[n] for n in sorted(self.all)]
        solved = sum(e.state == RIGHT for e in ordered)
        made = sum(guess is not None for guess in self.guesses.values())
        print(f"Exercises solved: {solved} of {len(ordered)}.")
        print(f"Predictions made: {made} of {len(self.guesses)}.")
        open_ones = [e for e in ordered if e.state != RIGHT]
        if open_ones:
            print(f"Next: {open_ones[0]}, in part {open_ones[0].part}.")
        rows = [(e.part, e.number, e.title, e.state) for e in ordered]
        columns = ["part", "exercise", "title", "state"]
        return pd.DataFrame(rows, columns=columns).set_index(["part", "exercise"])


def _returning(answer: Callable) -> Callable:
    """The answer; NotRight if it gives nothing, where only a hook may."""

    @wraps(answer)
    def called(*args: object, **kwargs: object) -> object:
        if (value := answer(*args, **kwargs)) is None:
            raise NotRight("You return None: did you forget `return`?")
        return value

    return called


def _parts(label: str, output: object) -> dict[str, object]:
    """A dict or tuple taken apart: label and part -> tensor or number."""
    if isinstance(output, Mapping):
        named = output.items()
    elif isinstance(output, (tuple, list)) and any(isinstance(o, ARRAY) for o in output):
        named = ((f"result {i} of {len(output)}", value) for i, value in enumerate(output, 1))
    else:
        return {label: output}
    return {f"{label}, {name}": value for name, value in named}


def _unchanged(after: object, before: object) -> bool:
    """Whether a copy of arguments still agrees with the original."""
    if isinstance(after, Tensor):
        if after.shape != before.shape or after.dtype != before.dtype:
            return False
        return torch.allclose(after, before, rtol=0, atol=0, equal_nan=True)
    if isinstance(after, Mapping):
        same_keys = after.keys() == before.keys()
        return same_keys and all(_unchanged(after[key], before[key]) for key in after)
    if isinstance(after, (tuple, list)):
        return len(after) == len(before) and all(map(_unchanged, after, before))
    comparable = isinstance(after, (Number, str, bool, type(None)))
    return after == before if comparable else type(after) is type(before)
