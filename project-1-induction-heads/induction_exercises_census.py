"""The exercise of the section beyond one model: fit the exponent of a power law.

As in `induction_exercises`: a right answer takes, after what the learner's function gets, what
mistakes do otherwise.
"""

from functools import partial

import torch
from induction_exercises_causal import EXERCISES, randn
from jaxtyping import Float
from torch import Tensor


def _exponent(
    x: Float[Tensor, "n"], y: Float[Tensor, "n"],
    of_x=torch.log, of_y=torch.log, centre=lambda v: v - v.mean(),
) -> float:  # fmt: skip
    a, b = centre(of_x(x)), centre(of_y(y))
    return ((a * b).sum() / (a * a).sum()).item()


def _between_two(x: Tensor, y: Tensor, i: int, j: int) -> float:
    return ((y[j] / y[i]).log() / (x[j] / x[i]).log()).item()


def _scale(x: Tensor, y: Tensor) -> float:
    return (y.log().mean() - _exponent(x, y) * x.log().mean()).exp().item()


def _grown(exponent: float, scale: float, seed: int, *x: float) -> tuple[Tensor, Tensor]:
    x = torch.tensor(list(map(float, x)))
    return x, scale * x**exponent * (0.2 * randn(len(x), seed=seed)).exp()


fit_exponent = EXERCISES.add(
    number=21, name="fit_exponent", part="C", title="fit an exponent", reference=_exponent,
    cases=lambda: {"steps that fall with the batch size": _grown(-0.6, 900.0, 0, 8, 16, 64, 128),
                   "a quantity that grows": _grown(1.7, 0.4, 3, 33, 95, 47, 67, 33)},
    mistakes={
        "You fit a straight line to the numbers themselves; fit it to their logarithms.":
            partial(_exponent, of_x=lambda x: x, of_y=lambda y: y),
        "You take the logarithm of y alone; a power law is straight in log x and log y.":
            partial(_exponent, of_x=lambda x: x),
        "You take the logarithm of x alone; a power law is straight in log x and log y.":
            partial(_exponent, of_y=lambda y: y),
        "Your line goes through the origin; it has an intercept, the scale: take the means off.":
            partial(_exponent, centre=lambda v: v),
        "You take x for y: the exponent is the slope of log y over log x.":
            lambda x, y: _exponent(y, x),
        "You divide one by the slope: the exponent is the slope of log y over log x.":
            lambda x, y: 1 / _exponent(x, y),
        "You use two points alone; least squares uses all of them.": [
            partial(_between_two, i=i, j=j) for i, j in ((0, -1), (0, 1), (-2, -1))],
        "You divide the spread of log y by that of log x, which is the slope only without noise, "
        "and has no sign; divide their covariance by the variance of log x.":
            lambda x, y: (y.log().std() / x.log().std()).item(),
        "You return the correlation; multiply it by the spread of log y over that of log x.":
            lambda x, y: torch.corrcoef(torch.stack([x.log(), y.log()]))[0, 1].item(),
        "You return the scale or its logarithm; the exponent is the other coefficient.":
            [_scale, lambda x, y: torch.tensor(_scale(x, y)).log().item()],
})  # fmt: skip
