"""The best rate: closed forms, its certainty, and a small wind tunnel that was really run."""

from __future__ import annotations

import math

import numpy as np
import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.rate_law import optimal_rate, rate_shift

# a plain-torch MiniCPM of 4 layers on byte text: 150 steps of 1,024 tokens, WSD with 20 % decay, one seed; final losses
RATES = 0.00125 * 2.0 ** np.arange(7)
MUP = {
    64: [2.396, 2.286, 2.176, 2.149, 2.241, 2.354, 2.918],
    128: [2.361, 2.235, 2.103, 2.073, 2.137, 2.342, 2.755],
    256: [2.359, 2.232, 2.106, 2.056, 2.109, 2.282, 2.781],
}
STANDARD = {  # at a quarter of the rates
    64: [3.147, 2.655, 2.449, 2.372, 2.484, 2.658, 2.682],
    128: [2.600, 2.417, 2.429, 2.429, 2.605, 2.634, 2.767],
}


def parabola(rates: np.ndarray, best: float, bend: float = 0.03) -> np.ndarray:
    return 2.0 + bend * np.log2(rates / best) ** 2


@pytest.mark.parametrize("window", [1, 2, 3])
@pytest.mark.parametrize("best", [0.006, 0.01, 0.0137])
def test_minimum_of_a_parabola(best: float, window: int) -> None:
    found = optimal_rate(RATES, parabola(RATES, best), window=window)
    assert found.rate == pytest.approx(best, rel=1e-9) and found.loss == pytest.approx(2.0, rel=1e-9)
    assert found.points == (6 if best == 0.006 and window == 3 else 2 * window + 1)  # 2 rates below 0.005


def test_order_of_rates_and_runs_that_diverged_do_not_matter() -> None:
    losses = parabola(RATES, 0.01)
    mixed = np.array([3, 0, 6, 2, 5, 1, 4])
    assert optimal_rate(RATES[mixed], losses[mixed]).rate == pytest.approx(0.01)
    losses[-1] = math.nan
    assert optimal_rate(RATES, losses).rate == pytest.approx(0.01)
    seeds = np.stack([losses, np.where(RATES > 0.03, np.inf, losses)])
    assert optimal_rate(RATES, seeds, window=1).rate == pytest.approx(0.01)


def test_error_of_the_best_rate_is_its_scatter_over_seeds() -> None:
    """Three seeds a rate, a thousand times: the stated error, and how often 95 % intervals hold."""
    generator, octaves, errors, held = np.random.default_rng(0), [], [], 0
    for _ in range(1000):
        seeds = parabola(RATES, 0.011) + 0.01 * generator.standard_normal((3, len(RATES)))
        found = optimal_rate(RATES, seeds)
        octaves.append(math.log2(found.rate))
        errors.append(found.octaves_error)
        held += 0.011 in found.interval()
    assert float(np.mean(errors)) == pytest.approx(float(np.std(octaves)), rel=0.1)
    assert 930 <= held <= 970


def test_three_points_of_one_seed_say_nothing_of_their_certainty() -> None:
    found = optimal_rate(RATES, parabola(RATES, 0.01), window=1)
    assert math.isnan(found.octaves_error)
    assert (found.interval().low, found.interval().high) == (0.0, math.inf)
    assert optimal_rate(RATES, parabola(RATES, 0.01), window=1, noise=0.01).octaves_error > 0


@pytest.mark.parametrize("slope", [-1.0, 0.0, 0.3])
def test_shift_of_a_power_law(slope: float) -> None:
    sizes = np.array([64.0, 128.0, 512.0])
    found = rate_shift(sizes, 0.01 * (sizes / 64) ** slope)
    assert found.slope == pytest.approx(slope, abs=1e-9) and found.spread == pytest.approx(3 * abs(slope), abs=1e-9)
    limits = found.slope_interval()
    assert limits.low <= found.slope <= limits.high < limits.low + 1e-6


def test_slope_is_held_by_its_interval() -> None:
    sizes, generator = 64 * 2.0 ** np.arange(5), np.random.default_rng(0)
    draws = [rate_shift(sizes, 0.01 * 2 ** (0.2 * generator.standard_normal(5))) for _ in range(500)]
    assert 0.92 <= np.mean([0.0 in found.slope_interval() for found in draws]) <= 0.98


def test_a_small_wind_tunnel() -> None:
    """muP keeps the best rate near 0.01 over a fourfold width; standard parametrisation does not."""
    best = {width: optimal_rate(RATES, losses) for width, losses in MUP.items()}
    assert all(0.0075 < found.rate < 0.012 for found in best.values())
    shift = rate_shift(list(best), [found.rate for found in best.values()])
    assert abs(shift.slope) < 0.1 and shift.spread < 0.2
    plain = [optimal_rate(RATES / 4, losses, window=1).rate for losses in STANDARD.values()]
    assert rate_shift(list(STANDARD), plain).slope < -1


@pytest.mark.parametrize(
    ("rates", "losses", "keywords", "line"),
    [
        ([1, 2, 4], [1, 2, 3], {}, "the best rate, 1, is the last on its side"),
        ([1, 2, 4], [3, 2, 1], {}, "the best rate, 4, is the last on its side"),
        ([1, 2, 4], [math.nan, 1, 2], {}, "the best rate, 2, is the last on its side"),
        ([1, 2, 4], [math.nan] * 3, {}, "nothing converged"),
        ([1, 2, 4], [1, 2], {}, r"losses: shape \(2,\) for \(3,\) rates"),
        ([1, 2, 2], [2, 1, 2], {}, "rates: not all positive and different"),
        ([1, 2, 4], [2, 1, 2], {"window": 0}, "window 0"),
        ([1, 2, 4], [2, 1, 2], {"noise": -1.0}, "noise -1.0"),
    ],
)
def test_refused(rates: list[float], losses: list[float], keywords: dict[str, float], line: str) -> None:
    with pytest.raises(UserError, match=line):
        optimal_rate(rates, losses, **keywords)  # type: ignore[arg-type]


def test_refused_sizes() -> None:
    with pytest.raises(UserError, match="not all positive"):
        rate_shift([0, 1], [0.1, 0.1])
    with pytest.raises(UserError, match="fewer than 2 different values"):
        rate_shift([64, 64], [0.1, 0.1])
