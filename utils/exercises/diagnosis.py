"""In what an answer differs from the right one, in words: axis, sign, scale, position or step."""

import math
from collections.abc import Iterator, Sequence
from itertools import combinations, permutations
from numbers import Number

import torch
from torch import Tensor

FUNCTIONS = {  # what was done to the right values; of two that fit the first is told
    "You return absolute values; the sign says which way, so keep it.": torch.abs,
    "Your values are the squares of the right ones.": torch.square,
    "Your values are the square roots of the right ones: leave the root out.": torch.sqrt,
    "Your values are one over the right ones: divide the other way round.": torch.reciprocal,
    "Your values are e to the power of the right ones: a logarithm is missing.": torch.exp,
    "Your values are the logarithms of the right ones: leave the logarithm out.": torch.log,
    "Your values are one minus the right ones.": lambda x: 1 - x,
    "You cut values below zero off; they are meant to stay.": lambda x: x.clamp(min=0),
    "You cut values above one off; they are meant to stay.": lambda x: x.clamp(max=1),
    "You cut values to lie between 0 and 1; they are meant to stay.": lambda x: x.clamp(0, 1),
    "You round your values; return them as they are.": torch.round,
}


def close(got: Tensor, want: Tensor) -> bool:
    """Equal in shape and, but for rounding, in values."""
    return got.shape == want.shape and torch.allclose(
        got, want, rtol=1e-3, atol=1e-4, equal_nan=True
    )


def same(got: object, want: object) -> bool:
    """Whether both are numbers or tensors, and equal but for rounding and type."""
    if not all(isinstance(x, (bool, Number, Tensor)) for x in (got, want)):
        return False
    one, other = (torch.as_tensor(x).detach().cpu().to_dense() for x in (got, want))
    complex_ = one.is_complex() or other.is_complex()
    return not complex_ and close(one.double(), other.double())


def difference(got: object, want: Tensor, axes: Sequence[str] = ()) -> str | None:
    """In what `got` differs from `want` (whose axes have these names), or None if in nothing."""
    if got is None:
        return "You return None: did you forget `return`?"
    if isinstance(got, (bool, Number)):
        got = torch.as_tensor(got)
    wanted = f"a tensor of shape {_shape(want.shape, axes)}" if want.ndim else "one number"
    if not isinstance(got, Tensor):
        return f"You return {a_kind(got)}; wanted is {wanted}."
    got = got.detach().cpu()
    got = got.to_dense() if got.layout != torch.strided else got
    if not want.is_floating_point() and want.dtype != torch.bool and got.is_floating_point():
        return (
            "You return floating-point numbers; wanted are whole ones, such as token ids (int64)."
        )
    if got.is_complex() and not want.is_complex():
        return "You return complex numbers; take the real part (`.real`) of the result."
    if not want.is_complex():
        got, want = got.double(), want.double()
    if close(got, want):
        return None
    names = _names(axes, want.ndim)
    if not got.numel():
        return f"Your result is empty (shape {list(got.shape)}); wanted is {wanted}."
    if got.shape != want.shape:
        reason = next(_of_shape(got, want, names), "")
        return f"Your result has shape {list(got.shape)}, wanted is {wanted}. {reason}".strip()
    if lost := int((got.isnan() & ~want.isnan()).sum()):
        return (
            f"{lost} of {got.numel()} values are NaN, as after 0 / 0, the logarithm of a negative "
            "number or the mean of nothing."
        )
    if lost := int((got.isinf() & ~want.isinf()).sum()):
        return f"{lost} of {got.numel()} values are infinite, as after log(0) or a division by 0."
    return kind_of_slip(got, want, names) or _size(got, want)


def _names(axes: Sequence[str], n: int) -> list[str]:
    """A name for each of `n` axes: the annotation's where they fit, else "axis 2" and so on."""
    named = [*axes[:-1]] if axes and axes[-1].startswith("*") else [*axes]
    fits = len(named) == n or (len(named) < n and len(named) < len(axes))
    named = named if fits else []
    return named + [f"axis {i}" for i in range(len(named), n)]


def kind_of_slip(got: Tensor, want: Tensor, names: Sequence[str] = ()) -> str | None:
    """What was done to the right values so that these came out, or None if none of the below.

    `names` are those of the axes; without them, no slip along an axis is looked for.
    """
    return next(_of_values(got, want, list(names)), None)


def _of_shape(got: Tensor, want: Tensor, names: list[str]) -> Iterator[str]:
    """Why the shape is another one; only the first reason that fits is told."""
    if close(got.squeeze(), want.squeeze()):
        yield "An axis of length one is too many or missing: squeeze or unsqueeze it."
    if want.ndim > 1 and not got.ndim:
        for what, value in (("average over", want.mean()), ("sum over", want.sum())):
            if close(got, value):
                yield f"You {what} everything; keep one value for each {' and '.join(names)}."
    if close(got.flatten(), want.flatten()):
        yield "The right values, strung together: give them their axes (`unflatten`, `reshape`)."
    for dim in range(got.ndim):
        if close(got.mean(dim), want):
            yield f"Your values are right one by one: average over axis {dim} of your result."
        if close(got.sum(dim), want):
            yield f"Your values are right one by one: sum over axis {dim} of your result."
        for side, length in (("first", 1), ("last", -1)):
            rest = got.narrow(dim, max(length, 0), max(got.shape[dim] - 1, 0))
            if close(rest, want):
                yield f"You have one entry too many: the {side} along axis {dim} does not belong."
    for one, other in combinations(range(got.ndim), 2):
        if got.shape[one] == got.shape[other]:
            own = got.diagonal(dim1=one, dim2=other)
            if close(own, want) or close(own.movedim(-1, 0), want):
                yield (
                    "You combine every entry with those of all the others, by broadcasting; each "
                    "belongs with its own, row by row."
                )
    for dim, name in enumerate(names):
        if close(got, want.mean(dim)):
            yield f"You average over {name}; keep one value for each."
        if close(got, want.sum(dim)):
            yield f"You sum over {name}; keep one value for each."
        for side, length in (("first", 1), ("last", -1)):
            if close(got, want.narrow(dim, max(length, 0), max(want.shape[dim] - 1, 0))):
                yield f"The {side} entry along {name} is missing."
        for i in range(want.shape[dim]):
            if close(got, want.select(dim, i)):
                yield f"This is entry {i} of {name} alone; return all of them."
    if got.ndim == want.ndim <= 5:
        for order in permutations(range(want.ndim)):
            if close(got.permute(order), want):
                yield f"The axes stand in another order: wanted is {_shape(want.shape, names)}."


def _of_values(got: Tensor, want: Tensor, names: list[str]) -> Iterator[str]:
    """What was done to the right values, in the right shape; only the first that fits is told."""
    # so the order is a priority: the likely before the odd, the special before the general
    if close(got, -want):
        yield "Your signs are turned round."
    if want.abs().max() > 0 and close(got, torch.zeros_like(got)):
        yield "Your result is zero everywhere."
    if want.numel() > 1:  # one number alone may fit by chance
        for sentence, function in FUNCTIONS.items():
            if close(got, function(want)):
                yield sentence
        for one, other in combinations(range(len(names)), 2):
            if got.shape[one] == got.shape[other] and close(got.transpose(one, other), want):
                yield f"Your result is transposed: {names[one]} and {names[other]} are exchanged."
        for dim, name in enumerate(names):
            yield from _along(got, want, dim, name)
        for dim, name in enumerate(names):
            yield from _order(got, want, dim, name)
        yield from _part(got, want, names, most=1 / 3)
        centred, right = got - got.mean(), want - want.mean()
        if close(got - want, (got - want).mean().expand_as(got)):
            yield f"All your values are off by the same {(got - want).mean():.3g}."
        factor = (got * want).sum() / (want * want).sum().clamp(min=1e-12)
        if close(got, factor * want) and factor.abs() > 1e-3:
            yield _scale(float(factor), want.shape, names)
        for dim, name in enumerate(names):
            yield from _by_entry(got, want, dim, name)
        if close(got.abs(), want.abs()):
            yield "The sizes are right, but some of the signs are turned round."
        slope = (centred * right).sum() / (right * right).sum().clamp(min=1e-12)
        if want.numel() > 3 and slope.abs() > 1e-3 and close(centred, slope * right):
            yield f"Yours are {slope:.3g} times the right values, and moved: scale and zero differ."
        if close(got.flatten().sort().values, want.flatten().sort().values):
            yield "The right values, in the wrong places."
        yield from _part(got, want, names, most=1)


def _along(got: Tensor, want: Tensor, dim: int, name: str) -> Iterator[str]:
    """Shifts, reversals, sums and means along one axis."""
    n = want.shape[dim]
    if n < 2:
        return
    if close(got, want.flip(dim)):
        yield f"Your result is back to front along {name}."
    for by in range(1, min(n - 1, 4)):
        if close(got.narrow(dim, by, n - by), want.narrow(dim, 0, n - by)):
            yield f"Your result is {by} too late along {name}."
        if close(got.narrow(dim, 0, n - by), want.narrow(dim, by, n - by)):
            yield f"Your result is {by} too early along {name}."
    if close(got, want.cumsum(dim)):
        yield f"Your values add up along {name}: each should stand for itself."
    mean = want.mean(dim, keepdim=True)
    if close(got, mean.expand_as(want)):
        yield f"You average over {name}; keep one value for each."
    if close(got, want - mean):
        yield f"You subtract the mean over {name}."
    if close(got, want.softmax(dim)):
        yield f"You take a softmax over {name}."
    if close(got, want / want.sum(dim, keepdim=True)):
        yield f"You divide by the sum over {name}."


def _order(got: Tensor, want: Tensor, dim: int, name: str) -> Iterator[str]:
    """Right entries of an axis in other places, or one and the same in every place."""
    mine, right, n = got.unbind(dim), want.unbind(dim), want.shape[dim]
    constant, flat = (all(close(x, one[0]) for x in one) for one in (mine, right))
    if n < 2 or (n > 10 and not constant):
        return
    order = [next((i for i, y in enumerate(right) if close(x, y)), -1) for x in mine]
    if not constant and min(order) >= 0:
        told, wanted = (", ".join(map(str, places)) for places in (order, range(n)))
        yield f"Along {name} you have {told}; wanted is the order {wanted}."
    elif constant and order[0] == n - 1:
        yield (
            f"Every {name} gets what belongs to the last. A function made in a loop sees the "
            "loop's variable as it is when called: bind it (`i=i`)."
        )
    elif constant and order[0] >= 0:
        yield f"Every {name} gets what belongs to {name} {order[0]}, counted from 0."
    elif constant and not flat:
        yield f"Your values are the same for every {name}; each has its own."


def _part(got: Tensor, want: Tensor, names: list[str], most: float) -> Iterator[str]:
    """Which entries along an axis are wrong, if these are at most the share `most` of all."""
    wrong = ~torch.isclose(got, want, rtol=1e-3, atol=1e-4, equal_nan=True)
    for dim, name in enumerate(names):
        at, n = _any_along(wrong, dim), want.shape[dim]
        right = [i for i in range(n) if i not in at]
        if not (at and right and len(at) <= most * n):
            continue
        zero = not got.index_select(dim, torch.tensor(at)).any()
        if len(at) <= len(right):
            told = f"Right but for {_listed(at, name, n)}"
        elif zero:
            told = f"Right for {_listed(right, name, n)} alone; the rest is zero"
        else:
            told = f"Right for {_listed(right, name, n)} alone"
        used_for_all = right == [0] and n > 2 and not zero
        if want.ndim == most == 1 and not (zero or used_for_all):
            continue  # of single values some may be right by chance
        yield f"{told}, counted from 0" + (
            ": is what belongs to it used for all?" if used_for_all else "."
        )


def _by_entry(got: Tensor, want: Tensor, dim: int, name: str) -> Iterator[str]:
    """Off by a factor or an amount that differs from entry to entry of an axis."""
    rest, n = [d for d in range(want.ndim) if d != dim], want.shape[dim]
    if n < 2 or want.numel() < 3 * n:
        return
    factor = (got * want).sum(rest, True) / (want * want).sum(rest, True).clamp(min=1e-12)
    amount = (got - want).mean(rest, True)
    off = _any_along(~torch.isclose(got, want, rtol=1e-3, atol=1e-4), dim)
    which = _listed(off, name, n) if len(off) < n else f"each {name}"
    if close(got, factor * want) and factor.abs().min() > 1e-3:
        yield (
            f"The values of {which} are off by a factor of its own ({_few(factor, off)}): what you "
            "divide or multiply by is wrong, such as that of another place, or not meant for each "
            f"{name}."
        )
    if close(got - want, amount.expand_as(got)):
        yield (
            f"The values of {which} are off by an amount of its own ({_few(amount, off)}): what "
            "you add or subtract is wrong, or does not belong, or is missing."
        )


def _any_along(where: Tensor, dim: int) -> list[int]:
    """The entries along an axis that hold any True."""
    return where.movedim(dim, 0).reshape(where.shape[dim], -1).any(1).nonzero().flatten().tolist()


def _few(values: Tensor, at: list[int]) -> str:
    told = [f"{x:.3g}" for x in values.flatten()[at[:4]].tolist()]
    return ", ".join(told + ["..."] * (len(at) > 4))


def _listed(at: list[int], name: str, n: int) -> str:
    """Some entries of an axis of length n."""
    told = ", ".join([*map(str, at[:4]), *["..."] * (len(at) > 4)])
    entries = f"{name}, {told}" if name.startswith("axis") else f"{name} {told}"
    return entries + " (the last)" * (at == [n - 1])


def _scale(factor: float, shape: Sequence[int], names: list[str]) -> str:
    for name, n in zip(names, shape, strict=False):
        if n > 2 and abs(factor * n - 1) < 1e-3:
            return f"Your values are {n} times too small: divided by the number of {name}?"
        if n > 2 and abs(factor / n - 1) < 1e-3:
            return f"Your values are {n} times too large: a sum for a mean over {name}?"
    sign = ", and the signs are turned round" if factor < 0 else ""
    for base in (2, 10):
        if abs(abs(factor) * math.log(base) - 1) < 1e-3:
            return f"Your logarithm is to base {base}{sign}; take the natural one (`log`)."
    kind = "too large" if abs(factor) > 1 else "too small"
    times = abs(factor) if abs(factor) > 1 else 1 / abs(factor)
    return f"All your values are {times:.3g} times {kind}{sign}: look at what you divide by."


def _size(got: Tensor, want: Tensor) -> str:
    """By how much it is off, and where most."""
    gap = torch.where(got == want, 0.0, (got - want).abs()).nan_to_num(posinf=torch.inf)
    worst = int(gap.argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(worst), gap.shape)]
    entry = f"entry {at} is" if at else "it is"
    return (
        f"Off by up to {gap.flatten()[worst]:.3g}: "
        f"{entry} {got.flatten()[worst]:.4g}, wanted is {want.flatten()[worst]:.4g}."
    )


def _shape(shape: Sequence[int], names: Sequence[str]) -> str:
    named = f" [{' '.join(names)}]" if len(names) == len(shape) and len(shape) else ""
    return f"{list(shape)}{named}"


def a_kind(value: object) -> str:
    """The type of a value, with its article."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"
