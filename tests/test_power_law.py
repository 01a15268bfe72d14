"""Power laws: planted exponents are found, with errors that cover them, and predict elsewhere."""

import math

import pytest
import torch

from utils.power_law import fit_power_law, held_out_share


@pytest.fixture(autouse=True)
def fewer_draws(monkeypatch):
    monkeypatch.setattr("utils.power_law.DRAWS", 100)


BATCH, CONTEXT, SEEDS = (8.0, 16.0, 32.0), (33.0, 47.0, 95.0), 4


def planted(noise, seed=0, alpha=-0.5, beta=1.5, n_seeds=SEEDS):
    """Runs of y = 3 * batch^alpha * context^beta, each seed with a scale of its own."""
    generator = torch.Generator().manual_seed(seed)
    grid = torch.cartesian_prod(torch.tensor(BATCH), torch.tensor(CONTEXT)).repeat(n_seeds, 1)
    seeds = torch.arange(n_seeds).repeat_interleave(len(BATCH) * len(CONTEXT))
    batch, context = grid.double().T
    scatter = noise * torch.randn(len(grid), generator=generator, dtype=torch.float64)
    y = 3 * batch**alpha * context**beta * scatter.exp()
    return {"batch": batch, "context": context}, y, seeds


def test_without_noise_it_is_exact():
    factors, y, seeds = planted(0.0)
    law = fit_power_law(factors, y, seeds)
    found = {name: estimate.mean for name, estimate in law.exponents.items()}
    assert found == pytest.approx({"batch": -0.5, "context": 1.5})
    assert law.scale == pytest.approx(3)
    assert all(e.stderr == pytest.approx(0, abs=1e-9) and e.n == 4 for e in law.exponents.values())
    assert law.at({"context": 60.0, "batch": 5.0}) == pytest.approx(3 * 5**-0.5 * 60**1.5)
    assert held_out_share(factors, y, seeds) == pytest.approx(1)


def test_it_is_least_squares_in_the_logarithms():
    factors, y, seeds = planted(0.3)
    x = torch.stack([torch.ones_like(y), *(v.log() for v in factors.values())], dim=1)
    want = torch.linalg.pinv(x) @ y.log()
    law = fit_power_law(factors, y, seeds)
    got = [math.log(law.scale), *(e.mean for e in law.exponents.values())]
    assert got == pytest.approx(want.tolist())


def test_two_errors_cover_the_truth_nearly_always_and_intervals_hold_the_estimate():
    covered, n = 0, 60
    for trial in range(n):
        law = fit_power_law(*planted(0.2, seed=trial, n_seeds=8))
        estimate = law.exponents["context"]
        covered += abs(estimate.mean - 1.5) < 2 * estimate.stderr
        low, high = law.intervals["context"]
        assert low <= estimate.mean <= high
    assert covered >= 0.85 * n


def test_the_draws_are_the_same_each_time_and_one_seed_has_no_error():
    first, again = (fit_power_law(*planted(0.2)).exponents["batch"].stderr for _ in range(2))
    assert first == pytest.approx(again, rel=1e-9)
    one = fit_power_law(*planted(0.2, n_seeds=1))
    assert math.isnan(one.exponents["batch"].stderr) and math.isfinite(one.exponents["batch"].mean)


def test_what_the_factors_do_not_say_is_not_predicted():
    factors, y, _ = planted(0.0)
    settings = torch.arange(9).repeat(SEEDS)
    assert held_out_share(factors, y, settings) > 0.99
    noise = torch.rand(len(y), generator=torch.Generator().manual_seed(0)).double() + 0.5
    assert held_out_share(factors, noise, settings) < 0.2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(factors={}), "factors is empty"),
        (dict(factors={"a": torch.ones(36).double()}), "factors: the factors must vary"),
        (dict(factors={"a": -torch.ones(36).double()}), "a must hold positive numbers"),
        (dict(y=torch.zeros(36).double()), "y must hold positive numbers"),
    ],
)
def test_what_cannot_be_fitted_is_refused(change, says):
    factors, y, seeds = planted(0.1)
    with pytest.raises(ValueError, match=says):
        fit_power_law(**dict(factors=factors, y=y, seeds=seeds) | change)


def test_a_law_is_asked_at_its_own_factors():
    law = fit_power_law(*planted(0.0))
    for wrong in ({"batch": 1.0}, {"batch": 1.0, "context": 0.0}, {}):
        with pytest.raises(ValueError, match="want a positive number for each of batch, context"):
            law.at(wrong)
