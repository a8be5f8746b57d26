"""Limits of the batch-size law hold the truth when each run is ahead or behind as a whole."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.batch_size_bootstrap import Contour, bootstrap, equal_loss_contours
from minicpm_megatron.methods.batch_size_law import BatchRun, BatchSizeLaw, contour, contour_minimum, fit_batch_size_law

KNOWN = BatchSizeLaw(6.0e8, 5.5)
SIZES = {9e6: 5.2, 3e7: 4.7, 1.7e8: 4.1}  # parameters -> loss after 1e8 tokens at the best batch size
BATCHES = np.geomspace(KNOWN.predict(4.6), KNOWN.predict(2.6), 6)
LOSSES = np.geomspace(3.0, 4.2, 8)


def runs(noise: float, seed: int = 0) -> list[BatchRun]:
    """Every run needs its own factor of tokens more or less, which drifts over the losses."""
    chance, loss = np.random.default_rng(seed), np.linspace(4.4, 2.9, 60)
    found = []
    for size, at in SIZES.items():
        for batch in BATCHES:
            away = math.log(batch) - np.log(KNOWN.a / loss**KNOWN.b)
            tokens = 1e8 * np.exp(3.0 * (at - loss) + 0.15 * away**2)
            ahead = noise * (chance.standard_normal() + 0.5 * chance.standard_normal() * (loss - 3.6))
            found.append(BatchRun(size, batch, tokens * np.exp(ahead), loss))
    return found


def test_limits_hold_the_truth_where_runs_share_their_noise() -> None:
    """60 draws, 95 % limits: at most 8 misses (3 expected). Minima taken for independent miss far more often."""
    inside = {"b": 0, "batch size": 0, "sizes": 0, "independent": 0}
    for seed in range(60):
        found = bootstrap(equal_loss_contours(runs(0.05, seed), LOSSES), resamples=300)
        inside["b"] += KNOWN.b in found.b_interval()
        inside["batch size"] += KNOWN.predict(3.0) in found.predict_interval(3.0)
        limits = found.size_interval()
        inside["sizes"] += limits is not None and 0 in limits
        inside["independent"] += KNOWN.b in found.fit.b_interval()
    assert min(inside["b"], inside["batch size"], inside["sizes"]) >= 52, inside
    assert inside["independent"] < 48, inside
    assert limits is not None and limits.high - limits.low < 1


def test_contours_and_law_are_those_of_the_plain_fit() -> None:
    given = runs(0.03)
    contours = equal_loss_contours(given, LOSSES)
    plain = fit_batch_size_law(given, LOSSES)
    found = bootstrap(contours)
    assert found.fit.law.b == pytest.approx(plain.law.b) and len(found.fit.minima) == len(plain.minima)
    for each in contours:
        batch, tokens = contour((run for run in given if run.size == each.size), each.loss)
        np.testing.assert_array_equal(each.batch, batch)
        np.testing.assert_array_equal(each.tokens, tokens)
    x = np.log([[1.0, each.loss, each.size] for each in found.fit.minima])
    x[:, 0] = 1
    y = np.log([each.batch for each in found.fit.minima])
    plane = np.linalg.lstsq(x, y, rcond=None)[0]
    assert (found.b_at_size, found.size_slope) == pytest.approx((-plane[1], plane[2]))
    parallel = found.b_at_size_interval()
    assert parallel is not None and parallel.low < KNOWN.b < parallel.high
    assert bootstrap(contours).b_interval() == found.b_interval()


def test_one_resample_by_hand() -> None:
    """With one weight a run, refitting what the weights make gives the resample's minimum."""
    from minicpm_megatron.methods.batch_size_bootstrap import _resampled_minima

    [one] = equal_loss_contours([run for run in runs(0.1) if run.size == 9e6], [3.5])
    weights = np.linspace(-1, 1, len(one.runs))
    x, y = np.log(one.batch), np.log(one.tokens)
    fitted = np.polyval(np.polyfit(x - x.mean(), y, 2), x - x.mean())
    design = np.vander(x - x.mean(), 3)
    leverage = np.diag(design @ np.linalg.inv(design.T @ design) @ design.T)
    made = np.exp(fitted + weights * (y - fitted) / np.sqrt(1 - leverage))
    expected = contour_minimum(one.batch, made, size=1, loss=1).batch
    assert np.exp(_resampled_minima(one, weights[None])) == pytest.approx(expected)


def test_too_little_is_refused_and_says_nothing() -> None:
    contours = equal_loss_contours(runs(0.0), [3.5, 3.4, 3.3])
    with pytest.raises(UserError, match="equal-loss contours with a minimum"):
        bootstrap(contours[:2])
    [edge] = equal_loss_contours([run for run in runs(0.0) if run.size == 9e6 and run.batch > 1e6], [4.2])
    assert isinstance(edge, Contour) and edge.minimum is None and edge.beyond == ""
    alone = bootstrap([each for each in contours if each.size == 9e6])
    assert alone.size_interval() is None and alone.b_at_size_interval() is None
