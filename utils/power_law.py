"""Power laws: how a quantity grows with others, y = scale * a^alpha * b^beta, over repeated runs.

law = fit_power_law({"batch": batch, "context": context}, steps, seeds)
law.exponents["batch"]                       # with its standard error over seeds
law.at({"batch": 48.0, "context": 71.0})     # what it predicts elsewhere
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from utils.checks import generator_of
from utils.metrics import Estimate
from utils.typed import checked

DRAWS = 1000


class PowerLaw(NamedTuple):
    """y = scale * product of each factor to its exponent; `intervals` hold 95 % of the draws."""

    scale: float
    exponents: dict[str, Estimate]
    intervals: dict[str, tuple[float, float]]

    def at(self, factors: Mapping[str, float]) -> float:
        """What the law predicts there. ValueError unless the factors are its own, and positive."""
        if set(factors) != set(self.exponents) or not all(
            0 < x < math.inf for x in factors.values()
        ):
            want = ", ".join(self.exponents)
            raise ValueError(f"factors: want a positive number for each of {want}, got {factors}")
        return self.scale * math.prod(x ** self.exponents[k].mean for k, x in factors.items())


@checked
def fit_power_law(
    factors: Mapping[str, Float[Tensor, "n"]],
    y: Float[Tensor, "n"],
    seeds: Int[Tensor, "n"],
) -> PowerLaw:
    """Least squares in log-log; errors from `DRAWS` draws of whole seeds, with replacement.

    Runs of one seed share their data and weights, so a seed is what could have been another. Few
    seeds drawn from themselves vary too little: the spread is widened by sqrt(k / (k - 1)) for k of
    them; with one it is nan. Raises ValueError for no factor, values that are not positive, or
    factors that do not vary independently (in any single seed).
    """
    logs = _logs(factors, y)
    groups = [torch.nonzero(seeds == one)[:, 0] for one in seeds.unique()]
    for rows in groups:
        _solve("factors", logs[0][rows], logs[1][rows])
    scale, *exponents = _solve("factors", *logs).tolist()
    drawn = torch.randint(len(groups), (DRAWS, len(groups)), generator=generator_of(0))
    picked = [torch.cat([groups[i] for i in draw]) for draw in drawn.tolist()]
    draws = torch.stack([_solve("factors", logs[0][rows], logs[1][rows]) for rows in picked])
    k = len(groups)
    widened = math.sqrt(k / (k - 1)) if k > 1 else math.nan
    middle = torch.tensor(exponents, dtype=torch.float64)
    draws = middle + widened * (draws[:, 1:] - middle)  # [draw factor]
    errors = draws.std(0, correction=0).tolist()
    low, high = (draws.quantile(q, dim=0).tolist() for q in (0.025, 0.975))
    estimates = [Estimate(e, error, k) for e, error in zip(exponents, errors, strict=True)]
    intervals = dict(zip(factors, zip(low, high, strict=True), strict=True))
    return PowerLaw(math.exp(scale), dict(zip(factors, estimates, strict=True)), intervals)


@checked
def held_out_share(
    factors: Mapping[str, Float[Tensor, "n"]], y: Float[Tensor, "n"], groups: Int[Tensor, "n"]
) -> float:
    """Share of the variance of log y that the law predicts for groups it was not fitted on.

    1: every group is predicted exactly; 0: as well as by the mean of all; negative: worse. Raises
    ValueError as `fit_power_law`, and for fewer than two groups, or a y that does not vary.
    """
    x, log_y = _logs(factors, y)
    if len(groups.unique()) < 2:
        raise ValueError(f"groups: want two or more, got {groups.unique().tolist()}")
    if log_y.std(correction=0) == 0:
        raise ValueError("y must vary, got values all the same")
    left = torch.empty_like(log_y)
    for group in groups.unique():
        out = groups == group
        left[out] = log_y[out] - x[out] @ _solve("groups", x[~out], log_y[~out])
    return 1 - (left.square().mean() / log_y.var(correction=0)).item()


def _logs(factors: Mapping[str, Tensor], y: Tensor) -> tuple[Tensor, Tensor]:
    """The columns [n, 1 + factor] and log y [n], in double precision."""
    if not factors:
        raise ValueError("factors is empty, want at least one")
    for name, values in {**factors, "y": y}.items():
        if len(values) == 0 or not (values.isfinite() & (values > 0)).all():
            raise ValueError(f"{name} must hold positive numbers, got {values.tolist()[:5]}")
    columns = [torch.ones_like(y), *(values.log() for values in factors.values())]
    return torch.stack(columns, dim=1).double(), y.double().log()


def _solve(name: str, x: Float[Tensor, "n k"], y: Float[Tensor, "n"]) -> Float[Tensor, "k"]:
    if torch.linalg.matrix_rank(x) < x.shape[1]:
        raise ValueError(f"{name}: the factors must vary, each by itself, in every group of runs")
    return torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
