"""Annotations that are checked: a bad argument ends in one sentence before anything is computed."""

import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from typing import TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor

Function = TypeVar("Function", bound=Callable)
Hooks = Sequence[tuple[str, Callable]]  # of TransformerLens: where, and what is done there
checker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float
ADVICE = {"TransformerBridge": "utils.models.load_model gives one", "Tensor": "use torch.tensor"}


class BadArgument(TypeError, ValueError):
    """An argument of the wrong type, or a tensor of the wrong kind or shape."""


def checked(function: Function, gaps_in: Sequence[str] = ()) -> Function:
    """Check a function's arguments and result against its annotations, at every call.

    Numbers and tensors must also be finite, but those in `gaps_in`: a nan compares as neither more
    nor less, so it would be ranked, counted or chosen without a word. Raises BadArgument, which
    says which argument, what came, what is wanted, and how long the named axes are that it has to
    agree with. (jaxtyping's own message prints every argument in full.)
    """
    verified = jaxtyped(function, typechecker=checker)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name not in gaps_in and (n := _not_finite(value)):
                raise BadArgument(f"{name} must be finite; {n} nan or infinite in {kind_of(value)}")
        try:
            return verified(*args, **kwargs)
        except TypeCheckError as error:
            text = str(error)
        name = re.search(r"typechecking parameter '(\w+)'", text)
        if name is None and "checking the parameters" in text:
            return call(*args, **kwargs)  # of a list one item is looked at, drawn at random: again
        if name is None:
            raise AssertionError(f"{function.__name__} broke its own promise: {text[:500]}")
        came = signature.bind(*args, **kwargs).arguments[name[1]]
        wanted = _words(signature.parameters[name[1]].annotation)
        axes = re.search(r"axis annotation are as follows\.\n(.*)", text, re.DOTALL)
        sizes = [row for row in axes[1].splitlines() if row.split("=")[0] in wanted] if axes else []
        known = f", where {', '.join(sizes)}" if sizes else ""
        sentence = f"{name[1]} must be {wanted}{known}; got {kind_of(came)}"
        raise BadArgument(sentence + ("" if isinstance(came, Tensor) else _advice(wanted)))

    return call


def kind_of(value: object) -> str:
    """A tensor by its type and shape, anything else as it prints, cut short."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    text = repr(value)
    return f"{text[:60]} ({type(value).__name__})" if len(text) < 200 else type(value).__name__


def _advice(wanted: str) -> str:
    """How to get what is wanted."""
    return next((f"; {words}" for kind, words in ADVICE.items() if kind in wanted), "")


def _not_finite(value: object) -> int:
    """How many of its numbers are nan or infinite, if it is a number or a tensor."""
    if isinstance(value, Tensor):
        finite = value.isfinite() if value.is_floating_point() else None
        return 0 if finite is None or finite.all() else int((~finite).sum())
    return isinstance(value, float) and not math.isfinite(value)


def _words(annotation: object) -> str:
    """An annotation as a reader would write it."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"<class '(.*)'>", r"\1", re.sub(r"\b(\w+\.)+(?=\w)", "", text))
