"""Envelopes: both forms found again, the right one preferred, hulls against brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.loss_envelope import (
    Envelope,
    compare_envelopes,
    convex_points,
    fit_envelope,
    optimal_points,
)

COMPUTE = np.geomspace(3, 300, 12)
POWER = Envelope("power", 0.4, 1.5, 2.3, 1.0, 0.0)
EXPONENTIAL = Envelope("exponential", 0.6, 0.02, 2.3, 1.0, 0.0)


@pytest.mark.parametrize("unit", [1.0, 1e18])
@pytest.mark.parametrize("known", [POWER, EXPONENTIAL], ids=lambda known: known.form)
def test_exact_losses_give_the_envelope_back(known: Envelope, unit: float) -> None:
    found = fit_envelope(unit * COMPUTE, known.loss(COMPUTE), known.form)
    scale = {"power": (1, unit**known.alpha), "exponential": (1, 1 / unit)}[known.form]
    assert found.alpha == pytest.approx(known.alpha * scale[0], rel=1e-4)
    assert found.beta == pytest.approx(known.beta * scale[1], rel=1e-4)
    assert found.l0 == pytest.approx(known.l0, rel=1e-4)
    assert found.r_squared == pytest.approx(1.0)
    np.testing.assert_allclose(found.loss(unit * COMPUTE), known.loss(COMPUTE), rtol=1e-6)


@pytest.mark.parametrize("known", [POWER, EXPONENTIAL], ids=lambda known: known.form)
def test_the_true_form_is_preferred(known: Envelope) -> None:
    noise = 0.005 * np.random.default_rng(0).standard_normal(len(COMPUTE))
    better, worse = compare_envelopes(COMPUTE, known.loss(COMPUTE) + noise)
    assert better.form == known.form
    assert better.r_squared > worse.r_squared and better.aic < worse.aic - 10


@pytest.mark.parametrize("known", [POWER, EXPONENTIAL], ids=lambda known: known.form)
def test_compute_for_a_loss_is_the_inverse(known: Envelope) -> None:
    for compute in (0.5, 7.0, 90.0):
        assert known.compute_for(float(known.loss(compute))) == pytest.approx(compute)
    assert known.compute_for(known.l0) == known.compute_for(known.l0 - 1) == math.inf
    assert EXPONENTIAL.compute_for(5.0) == 0.0


def test_criterion_by_hand() -> None:
    losses = POWER.loss(COMPUTE) + 0.01 * np.cos(np.arange(12))
    found = fit_envelope(COMPUTE, losses)
    rest = float(np.sum((losses - found.loss(COMPUTE)) ** 2))
    assert found.aic == pytest.approx(12 * math.log(rest / 12) + 8 + 40 / 7)
    assert found.r_squared == pytest.approx(1 - rest / float(np.sum((losses - losses.mean()) ** 2)))


def test_points_no_other_one_beats() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        compute, loss = generator.uniform(1, 9, 15).round(), generator.uniform(2, 4, 15).round(1)
        points = list(zip(compute, loss, strict=True))
        expected = {
            points.index(one)
            for one in points
            if not any(c <= one[0] and y <= one[1] and (c, y) != one for c, y in points)
        }
        assert set(optimal_points(compute, loss)) == expected


def test_hull_lies_below_every_point_and_goes_through_its_own() -> None:
    generator = np.random.default_rng(1)
    compute, loss = generator.uniform(1, 100, 40), generator.uniform(2, 4, 40)
    hull = convex_points(compute, loss)
    x, y = np.log(compute), np.log(loss)
    assert (y >= np.interp(x, x[hull], y[hull], left=np.inf) - 1e-12).sum() >= 40 - (x < x[hull[0]]).sum()
    slopes = np.diff(y[hull]) / np.diff(x[hull])
    assert all(a < b < 0 for a, b in itertools.pairwise(slopes))


def test_a_straight_line_is_its_own_hull_by_its_ends() -> None:
    assert convex_points([1, 10, 100], [4.0, 2.0, 1.0]) == [0, 2]
    assert convex_points([5.0], [2.0]) == [0]


@pytest.mark.parametrize(
    ("compute", "loss", "form", "line"),
    [
        ([1, 2], [1], "power", "compute and loss: shapes"),
        ([1, 2, 3, 4, 5], [1] * 5, "power", "5 points for 3 coefficients"),
        ([1, 1, 1, 2, 2, 3], [1] * 6, "power", "6 points for 3 coefficients"),
        ([1, 2, 3, 4, 5, 0], [1] * 6, "power", "compute: has a value"),
        ([1, 2, 3, 4, 5, 6], [1] * 5 + [math.nan], "power", "loss: has a value"),
        ([1, 2, 3, 4, 5, 6], [1] * 6, "linear", "unknown form 'linear'"),
    ],
)
def test_refused(compute: list[float], loss: list[float], form: str, line: str) -> None:
    with pytest.raises(UserError, match=line):
        fit_envelope(compute, loss, form)  # type: ignore[arg-type]
