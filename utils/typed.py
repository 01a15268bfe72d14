"""Annotations that are checked: a bad argument ends in one sentence before anything is computed."""

import functools
import inspect
import re
from collections.abc import Callable
from typing import TypeVar

from beartype import BeartypeConf, beartype
from jaxtyping import TypeCheckError, jaxtyped
from torch import Tensor

Function = TypeVar("Function", bound=Callable)
checker = beartype(conf=BeartypeConf(is_pep484_tower=True))  # an int will do for a float


class BadArgument(TypeError, ValueError):
    """An argument of the wrong type, or a tensor of the wrong kind or shape."""


def checked(function: Function) -> Function:
    """Check a function's arguments and result against its annotations, at every call.

    Raises BadArgument, which says which argument, what came, what is wanted, and how long the named
    axes are that it has to agree with. (jaxtyping's own message prints every argument in full.)
    """
    verified = jaxtyped(function, typechecker=checker)
    signature = inspect.signature(function)

    @functools.wraps(function)
    def call(*args, **kwargs):
        try:
            return verified(*args, **kwargs)
        except TypeCheckError as error:
            text = str(error)
        name = re.search(r"typechecking parameter '(\w+)'", text)
        if name is None:
            raise AssertionError(f"{function.__name__} broke its own promise: {text[:500]}")
        came = signature.bind(*args, **kwargs).arguments[name[1]]
        wanted = _words(signature.parameters[name[1]].annotation)
        axes = re.search(r"axis annotation are as follows\.\n(.*)", text, re.DOTALL)
        sizes = [row for row in axes[1].splitlines() if row.split("=")[0] in wanted] if axes else []
        known = f", where {', '.join(sizes)}" if sizes else ""
        raise BadArgument(f"{name[1]} must be {wanted}{known}; got {_kind(came)}")

    return call


def _words(annotation: object) -> str:
    """An annotation as a reader would write it."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return re.sub(r"<class '(.*)'>", r"\1", re.sub(r"\b(\w+\.)+(?=\w)", "", text))


def _kind(value: object) -> str:
    """A tensor by its type and shape, anything else as it prints, cut short."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} of shape {list(value.shape)}"
    text = repr(value)
    return f"{text[:60]} ({type(value).__name__})" if len(text) < 200 else type(value).__name__
