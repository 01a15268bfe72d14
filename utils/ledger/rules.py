"""What a claim's rule is made of: comparisons that know when they cannot tell.

    every(above(lost, 0.5), below(control, 0.25))

A figure is a number, or a mean with its standard error (`metrics.Estimate`). A comparison is True
or False when the bound lies more than two standard errors away, and None, undecided, when it does
not. A number without an error is what it is.
"""

import math
from functools import partial

import numpy as np

from utils.typed import checked

Verdict = bool | None
Figure = float | tuple[float, float, int]
ERRORS = 2  # about the 95 % interval
# `checked` refuses nan; these accept it, for the ledger has a verdict on it: it does not hold
numbers = partial(checked, gaps_in=("figure", "bound"))


@numbers
def above(figure: Figure, bound: Figure) -> Verdict:
    """Whether the figure lies above the bound."""
    gap, error = _gap(figure, bound)
    return _decided(gap, error, gap > 0)


@numbers
def at_least(figure: Figure, bound: Figure) -> Verdict:
    """The same where the bound itself is enough."""
    gap, error = _gap(figure, bound)
    return _decided(gap, error, gap >= 0)


@numbers
def below(figure: Figure, bound: Figure) -> Verdict:
    """Whether the figure lies below the bound."""
    return above(bound, figure)


def every(*verdicts: Verdict) -> Verdict:
    """False if any is, else None if any is, else True. TypeError for what is none of these."""
    if bad := [v for v in verdicts if not (v is None or isinstance(v, bool | np.bool_))]:
        raise TypeError(f"verdicts must be True, False or None, got {bad[0]!r}")
    if any(verdict is not None and not verdict for verdict in verdicts):
        return False
    return None if any(verdict is None for verdict in verdicts) else True


def _gap(figure: Figure, bound: Figure) -> tuple[float, float]:
    """How far the figure is above the bound, and the error of that if the two are independent."""
    (value, error), (edge, other) = map(_mean_and_error, (figure, bound))
    return value - edge, math.hypot(error, other)


def _mean_and_error(figure: Figure) -> tuple[float, float]:
    return (figure[0], figure[1]) if isinstance(figure, tuple) else (figure, 0.0)


def _decided(gap: float, error: float, answer: bool) -> Verdict:
    # an error of nan, as of a single prompt, decides nothing
    return answer if error == 0 or abs(gap) > ERRORS * error else None
