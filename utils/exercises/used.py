"""A right answer at work: the cells below call it, and the library's version if it fails there."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from numbers import Number

import torch
from jaxtyping import AbstractArray, jaxtyped
from torch import Tensor

from utils.exercises.diagnosis import a_kind
from utils.exercises.learner import NotRight, contained, describe

USE_SECONDS = 120


def in_use(answer: Callable, reference: Callable, title: str, is_hook: bool) -> Callable:
    """A function that calls the answer until that fails, and from there on the reference.

    It fails if it raises, takes longer than two minutes, or gives another shape than the reference
    is annotated with. A sentence that begins with `title` then says so. A hook may return nothing.
    """
    failed = False

    @wraps(answer)
    def used(*args: object, **kwargs: object) -> object:
        nonlocal failed
        if failed:
            return reference(*args, **kwargs)
        try:
            with contained(USE_SECONDS):
                value = answer(*args, **kwargs)
                return _in_wanted_type(value, reference, args, kwargs, is_hook)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            failed = True
            why = str(error) if isinstance(error, NotRight) else describe(error, answer)
            print(f"{title}: {why} The library's version takes over.")
        return reference(*args, **kwargs)

    return used


def _in_wanted_type(
    value: object, reference: Callable, args: tuple, kwargs: Mapping[str, object], is_hook: bool
) -> object:
    """The value in the type and precision that the cells below count on.

    Raises NotRight for a shape that is not the annotation's.
    """
    signature = inspect.signature(reference)
    annotation = signature.return_annotation
    if value is None and is_hook:
        return None
    if annotation is float and isinstance(value, Tensor):
        return value.item()
    if not _is_of_tensors(annotation):
        return value
    value = torch.as_tensor(value) if isinstance(value, Number) else value
    if isinstance(value, Tensor) and value.is_floating_point():
        like = args[0] if is_hook else torch.empty(0)
        value = value.to(like.dtype)
    with jaxtyped("context"):  # checking the arguments fixes how long each named axis is
        for name, argument in signature.bind(*args, **kwargs).arguments.items():
            wanted = signature.parameters[name].annotation
            if _is_of_tensors(wanted):
                isinstance(argument, wanted)
        if not isinstance(value, annotation):
            got = list(value.shape) if isinstance(value, Tensor) else a_kind(value)
            raise NotRight(f"Your function gives {got}, wanted is [{annotation.dim_str}].")
    return value


def _is_of_tensors(annotation: object) -> bool:
    return inspect.isclass(annotation) and issubclass(annotation, AbstractArray)
