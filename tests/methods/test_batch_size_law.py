"""The batch-size law: the paper's values, and a known law found again in loss curves that were made from it."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.batch_size_law import (
    PUBLISHED,
    BatchRun,
    BatchSizeLaw,
    contour,
    contour_minimum,
    fit_batch_size_law,
    tokens_to_loss,
)

KNOWN = BatchSizeLaw(6.0e8, 5.5)
SIZES = {9e6: 5.2, 3e7: 4.7, 1.7e8: 4.1}  # parameters -> loss after 1e8 tokens at the best batch size
LOSSES = (3.2, 3.5, 3.8)
BATCHES = np.geomspace(KNOWN.predict(4.2), KNOWN.predict(2.8), 6)


def known_tokens(size: float, batch: float, loss: np.ndarray) -> np.ndarray:
    """Tokens that a batch size needs: least at the known law, a parabola in log-log around it."""
    least = 1e8 * np.exp(3.0 * (SIZES[size] - loss))
    return least * np.exp(0.15 * (math.log(batch) - np.log(KNOWN.a / loss**KNOWN.b)) ** 2)


def runs(noise: float, seed: int = 0) -> list[BatchRun]:
    generator, found = np.random.default_rng(seed), []
    for size in SIZES:
        for batch in BATCHES:
            loss = np.linspace(4.4, 2.9, 400)
            tokens = known_tokens(size, batch, loss)
            assert (np.diff(tokens) > 0).all()
            found.append(BatchRun(size, batch, tokens, loss + noise * generator.standard_normal(len(loss))))
    return found


@pytest.mark.parametrize(("loss", "millions"), [(2.5, 3.98), (3.0, 1.28), (3.5, 0.49), (4.0, 0.21)])
def test_published_law(loss: float, millions: float) -> None:
    assert PUBLISHED.predict(loss) / 1e6 == pytest.approx(millions, abs=0.005)


def test_exact_curves_give_the_law_back() -> None:
    found = fit_batch_size_law(runs(0.0), LOSSES)
    assert len(found.minima) == len(SIZES) * len(LOSSES)
    assert found.law.b == pytest.approx(KNOWN.b, rel=1e-3)
    assert found.law.predict(3.5) == pytest.approx(KNOWN.predict(3.5), rel=1e-3)
    for minimum in found.minima:
        assert minimum.batch == pytest.approx(KNOWN.predict(minimum.loss), rel=2e-3)
        expected = known_tokens(minimum.size, minimum.batch, np.array(minimum.loss))
        assert minimum.tokens == pytest.approx(float(expected), rel=1e-3)


def test_noisy_curves_give_the_law_back_within_its_intervals() -> None:
    """Losses so far apart that the minima are independent: 40 draws, 95 % intervals, at most 5 misses (2 expected)."""
    inside = {"b": 0, "batch size": 0}
    for seed in range(40):
        found = fit_batch_size_law(runs(0.02, seed), LOSSES, smooth=9)
        assert found.law.b == pytest.approx(KNOWN.b, rel=0.15)
        inside["b"] += KNOWN.b in found.b_interval()
        inside["batch size"] += KNOWN.predict(3.0) in found.predict_interval(3.0)
    assert min(inside.values()) >= 35, inside
    limits = found.b_interval()
    assert limits.low < limits.estimate == found.law.b < limits.high < limits.low + 0.3 * KNOWN.b
    assert found.predict_interval(3.0).estimate == pytest.approx(found.law.predict(3.0))


def test_a_noisy_curve_crosses_late_and_early_alike() -> None:
    """The first crossing of the raw curve is early by much more than its noise averages to."""
    tokens = np.geomspace(1e6, 1e8, 400)
    true = 5 - 0.5 * np.log10(tokens / 1e6)
    errors, first = [], []
    for seed in range(50):
        noisy = true + 0.05 * np.random.default_rng(seed).standard_normal(len(tokens))
        errors.append(math.log10(tokens_to_loss(tokens, noisy, 4.5, smooth=9) / 1e7))
        first.append(math.log10(tokens[np.argmax(noisy <= 4.5)] / 1e7))
    assert abs(np.mean(errors)) < 0.02 and np.std(errors) < 0.05
    assert np.mean(first) < -0.1


def test_crossings_of_a_curve() -> None:
    tokens, loss = [1, 10, 100, 1000], [4.0, 3.0, 3.0, 2.0]
    assert tokens_to_loss([1, 10, 100], [4.0, 3.0, 2.0], 3.5) == pytest.approx(10**0.5)
    # the level stretch counts as one point, in its middle at 10^1.5
    assert tokens_to_loss(tokens, loss, 3.0) == pytest.approx(10**1.5)
    assert tokens_to_loss(tokens, loss, 3.5) == pytest.approx(10**0.75)
    # and so does a rise
    assert tokens_to_loss(tokens, [4.0, 2.9, 3.1, 2.0], 3.5) == pytest.approx(10**0.75)
    assert tokens_to_loss(tokens, loss, 2.0) == pytest.approx(1000)
    assert math.isnan(tokens_to_loss(tokens, loss, 1.9)) and math.isnan(tokens_to_loss(tokens, loss, 4.1))
    # averages of three: (4 + 3 + 3) / 3 at 10, (3 + 3 + 2) / 3 at 100; ends as they are
    assert tokens_to_loss(tokens, loss, 3.0, smooth=3) == pytest.approx(10**1.5)


def test_runs_that_do_not_reach_the_loss_are_not_on_its_contour() -> None:
    tokens = np.array([1.0, 10.0])
    some = [
        BatchRun(1.0, 8.0, tokens, np.array([4.0, 2.0])),
        BatchRun(1.0, 2.0, tokens, np.array([4.0, 3.5])),
        BatchRun(1.0, 4.0, tokens, np.array([4.0, 3.0])),
    ]
    batches, needed = contour(some, 3.0)
    np.testing.assert_allclose(batches, [4.0, 8.0])
    np.testing.assert_allclose(needed, [10.0, 10**0.5])
    assert [len(part) for part in contour(some, 1.0)] == [0, 0]


def test_a_minimum_outside_the_measured_batch_sizes_is_refused() -> None:
    batches = np.array([1.0, 2.0, 4.0, 8.0])
    with pytest.raises(UserError, match="size 9e.06: .* for loss 3.0 is outside the measured ones, at 16"):
        contour_minimum(batches, np.exp(np.log(batches / 16) ** 2), size=9e6, loss=3.0)
    with pytest.raises(UserError, match="has no minimum"):
        contour_minimum(batches, np.exp(-(np.log(batches / 4) ** 2)), size=9e6, loss=3.0)


def test_a_law_needs_three_minima() -> None:
    with pytest.raises(UserError, match="2 equal-loss contours with a minimum"):
        fit_batch_size_law([run for run in runs(0.0) if run.size == 9e6], LOSSES[:2])
    # losses that no run reaches are left out
    assert len(fit_batch_size_law(runs(0.0), (*LOSSES, 1.0)).minima) == 9


@pytest.mark.parametrize(
    ("tokens", "loss", "smooth", "line"),
    [
        ([1, 2], [3.0], 1, "shapes"),
        ([2, 1], [3.0, 2.0], 1, "tokens: do not rise"),
        ([0, 1], [3.0, 2.0], 1, "tokens: do not rise"),
        ([1, 2], [3.0, math.nan], 1, "not finite"),
        ([1, 2], [3.0, 2.0], 2, "smooth: 2 is no odd number"),
    ],
)
def test_refused_curves(tokens: list[float], loss: list[float], smooth: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        tokens_to_loss(tokens, loss, 2.5, smooth=smooth)
