"""Lines and parabolas against numpy, their certainty against repeated draws."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.intervals import Interval, percentile_interval, t_quantile
from minicpm_megatron.methods.polynomial import fit_line, fit_parabola

X = np.array([-2.0, -1.0, 0.0, 1.0, 2.0, 5.0])  # not symmetric: slope and bend are correlated


def test_as_numpy_fits_them() -> None:
    y = np.random.default_rng(0).standard_normal(6) + X**2
    (slope, intercept), covariance = np.polyfit(X, y, 1, cov=True)
    line = fit_line(X, y)
    assert (line.slope, line.at(0.0)) == (pytest.approx(slope), pytest.approx(intercept))
    assert line.slope_error == pytest.approx(math.sqrt(covariance[0, 0]))
    reach = line.interval_at(0.0).high - line.at(0.0)
    assert reach == pytest.approx(t_quantile(0.95, 4) * math.sqrt(covariance[1, 1]))
    bend, tilt, _ = np.polyfit(X, y, 2)
    assert fit_parabola(X, y).lowest_at == pytest.approx(-tilt / (2 * bend))


def test_error_of_the_minimum_is_its_scatter() -> None:
    true = 0.3 * (X - 0.5) ** 2
    draws = true + 0.1 * np.random.default_rng(0).standard_normal((2000, len(X)))
    found = [fit_parabola(X, y, noise=0.1) for y in draws]
    at = np.array([parabola.lowest_at for parabola in found])
    assert fit_parabola(X, true, noise=0.1).lowest_at_error == pytest.approx(float(at.std()), rel=0.1)
    held = np.mean([0.5 in parabola.lowest_at_interval(0.9) for parabola in found])
    assert held == pytest.approx(0.9, abs=0.02)
    unknown = np.mean([0.5 in fit_parabola(X, y).lowest_at_interval(0.9) for y in draws])
    assert unknown == pytest.approx(0.9, abs=0.02)


def test_what_cannot_be_known_is_everything() -> None:
    exact = fit_parabola([0, 1, 2], [1.0, 0.0, 1.0])
    assert exact.lowest_at == pytest.approx(1.0) and math.isnan(exact.lowest_at_error)
    assert exact.lowest_at_interval() == Interval(-math.inf, exact.lowest_at, math.inf)
    hidden = fit_parabola([0, 1, 2], [1.0, 0.9, 1.0], noise=10.0).lowest_at_interval()
    assert (hidden.low, hidden.high) == (-math.inf, math.inf)
    assert fit_line([0, 1], [0, 1]).slope_interval().high == math.inf


def test_limits_of_the_minimum_solve_their_equation() -> None:
    """At each limit the derivative is t standard errors from zero."""
    parabola = fit_parabola(X, 0.3 * (X - 0.5) ** 2, noise=0.2, noise_dof=7)
    limits = parabola.lowest_at_interval(0.9)
    for at in (limits.low, limits.high):
        powers = np.array([0.0, 1.0, 2 * (at - parabola.centre)])
        error = math.sqrt(powers @ parabola.covariance @ powers)
        assert abs(powers @ parabola.coefficients) / error == pytest.approx(t_quantile(0.9, 7))


def test_percentiles_are_those_of_students_t() -> None:
    """Of normal resamples the expanded percentile interval is the t interval."""
    resampled = np.random.default_rng(0).standard_normal(400_000)
    found = percentile_interval(0.0, resampled, 0.95, 5)
    assert found.high == pytest.approx(2.571, abs=0.03) and found.low == pytest.approx(-2.571, abs=0.03)
    assert percentile_interval(0.0, np.array([1.0, math.inf]), 0.95, 5).high == math.inf


@pytest.mark.parametrize(("level", "dof", "value"), [(0.95, math.inf, 1.95996), (0.95, 1, 12.7062), (0.9, 10, 1.81246)])
def test_t_quantiles(level: float, dof: float, value: float) -> None:
    assert t_quantile(level, dof) == pytest.approx(value, abs=1e-4)


def test_refused() -> None:
    with pytest.raises(UserError, match="x: fewer than 3 different values"):
        fit_parabola([0, 1, 1], [0, 1, 1])
    with pytest.raises(UserError, match="the parabola: has no minimum"):
        fit_parabola([0, 1, 2], [0, 1, 0])
    with pytest.raises(UserError, match="x and y: shapes"):
        fit_line([0, 1, 2], [0, 1])
    with pytest.raises(UserError, match="level: 95 is not between 0 and 1"):
        t_quantile(95, 3)
