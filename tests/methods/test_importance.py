"""Shares of variance against closed forms, Sobol's definition and refits."""

from __future__ import annotations

import numpy as np
import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.importance import importances

SLOPES, CURVES = np.array([0.5, -0.1, 0.0, 1.0]), np.array([0.2, 0.0, 0.6, 1.5])


def bowl(u):
    return 4.5 + u @ SLOPES + u**2 @ CURVES


def test_a_sum_of_parabolas_has_the_shares_of_the_closed_form_and_of_sobols_definition() -> None:
    chance = np.random.default_rng(0)
    points = np.tanh(chance.standard_normal((30, 4)))  # not even over the box, as those of a search are not
    found = importances(points, bowl(points))
    # variances of b u + c u^2 on [-1, 1]
    variances = SLOPES**2 / 3 + CURVES**2 * 4 / 45
    assert found.shares == pytest.approx(variances / variances.sum(), abs=1e-9)
    assert found.predicted == pytest.approx(1)
    grid = np.linspace(-1, 1, 41)
    others = chance.uniform(-1, 1, (2000, 4))
    means = []
    for setting in range(4):
        sets = np.repeat(others[None], len(grid), axis=0)
        sets[:, :, setting] = grid[:, None]
        means.append(bowl(sets).mean(axis=1).var())
    assert found.shares == pytest.approx(np.array(means) / sum(means), abs=0.03)


def test_what_is_predicted_is_what_refits_without_each_point_predict() -> None:
    chance = np.random.default_rng(1)
    points = chance.uniform(-1, 1, (20, 3))
    losses = chance.standard_normal(20) + points[:, 0]
    surface = np.concatenate([np.ones((20, 1)), points, points**2], axis=1)
    errors = []
    for left_out in range(20):
        rest = np.arange(20) != left_out
        fit = np.linalg.lstsq(surface[rest], losses[rest], rcond=None)[0]
        errors.append(losses[left_out] - surface[left_out] @ fit)
    assert importances(points, losses).predicted == pytest.approx(1 - np.mean(np.square(errors)) / losses.var())


POINTS = np.random.default_rng(2).uniform(-1, 1, (20, 2))


@pytest.mark.parametrize(
    ("points", "losses", "told"),
    [
        (POINTS[:6], POINTS[:6, 0], "6 losses, and 2 settings need 7"),
        (POINTS, np.ones(20), "all losses are the same"),
        (POINTS, np.full(20, np.inf), "not all numbers are finite"),
        (POINTS * [1, 0], POINTS[:, 0], "do not determine"),
        (POINTS, np.ones(3), "not one loss for every point"),
    ],
)
def test_what_tells_nothing_is_said(points, losses, told) -> None:
    with pytest.raises(UserError, match=told):
        importances(points, losses)
