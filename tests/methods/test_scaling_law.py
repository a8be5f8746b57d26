"""The scaling law: the paper's table, a numerical optimum, known laws found again and held by their intervals."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

import minicpm_megatron
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.scaling_law import (
    HUBER_DELTA,
    PUBLISHED,
    PUBLISHED_COMPUTE,
    Points,
    ScalingLaw,
    coefficients,
    fit_scaling_law,
)
from minicpm_megatron.methods.scaling_law_bootstrap import bootstrap, leverage, refit

# six sizes, six decayed checkpoints each at 10N to 60N (section 4.5)
N = np.repeat([0.04, 0.1, 0.3, 0.5, 0.85, 2.0], 6)
D = N * np.tile(np.arange(10, 70, 10), 6)
LAW = PUBLISHED["average"].law
METHODS = ("curve_fit", "huber")


def noisy(noise: float, seed: int, law: ScalingLaw = LAW) -> np.ndarray:
    return law.loss(N, D) + noise * np.random.default_rng(seed).standard_normal(len(N))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_coefficients_give_the_published_optimum(name: str) -> None:
    """Two digits of a coefficient leave 7 % of the ratio, and the second decimal of K^2 and eta open."""
    row = PUBLISHED[name]
    assert row.law.tokens_per_parameter(PUBLISHED_COMPUTE) == pytest.approx(row.tokens_per_parameter, rel=0.07)
    assert row.law.k**2 == pytest.approx(row.k_squared, abs=0.007)
    assert row.law.eta == pytest.approx(row.eta, abs=0.016)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("compute", [1e18, 1e21, 3e23])
def test_the_optimum_is_where_a_search_finds_it(name: str, compute: float) -> None:
    law = PUBLISHED[name].law

    def loss_of(log_n: float) -> float:
        n = math.exp(log_n)
        return float(law.loss(n, compute / 6 / (n * 1e9) / 1e9))

    found = minimize_scalar(loss_of, bounds=(-12, 12), method="bounded", options={"xatol": 1e-9})
    n, d = law.n_opt(compute), law.d_opt(compute)
    assert n == pytest.approx(math.exp(found.x), rel=1e-5)
    assert 6 * n * 1e9 * d * 1e9 == pytest.approx(compute, rel=1e-12)
    assert law.tokens_per_parameter(compute) == pytest.approx(d / n, rel=1e-12)
    assert n / d == pytest.approx(law.k**2 * (compute / 1e18 / 6) ** law.eta, rel=1e-12)


def test_tokens_for_a_loss() -> None:
    d = LAW.tokens_for(0.5, 0.5)
    assert float(LAW.loss(0.5, d)) == pytest.approx(0.5, rel=1e-12)
    assert LAW.tokens_for(0.5, 0.39) == math.inf  # 0.31 + 0.087 of its size
    assert float(LAW.loss(0, 1)) == math.inf


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_exact_losses_give_the_law_back(name: str, method: str) -> None:
    law = PUBLISHED[name].law
    found = fit_scaling_law(N, D, law.loss(N, D), method)
    np.testing.assert_allclose(coefficients(found), coefficients(law), rtol=1e-5)


def test_another_unit_of_the_loss_scales_the_coefficients() -> None:
    losses = noisy(0.002, 3)
    one, three = fit_scaling_law(N, D, losses), fit_scaling_law(N, D, 3 * losses)
    np.testing.assert_allclose(coefficients(three), coefficients(one) * [3, 1, 3, 1, 3], rtol=1e-5)
    # Huber's loss of logs does not see the unit at all
    one, three = (fit_scaling_law(N, D, scale * losses, "huber") for scale in (1, 3))
    np.testing.assert_allclose(coefficients(three), coefficients(one) * [3, 1, 3, 1, 3], rtol=1e-3)


def test_huber_ignores_a_wild_point_and_least_squares_does_not() -> None:
    losses = noisy(0.0005, 0)
    losses[17] *= 1.2
    robust, plain = (fit_scaling_law(N, D, losses, method) for method in ("huber", "curve_fit"))
    assert robust.alpha == pytest.approx(LAW.alpha, rel=0.1) and robust.beta == pytest.approx(LAW.beta, rel=0.1)
    assert abs(plain.alpha / LAW.alpha - 1) > 0.2 or abs(plain.beta / LAW.beta - 1) > 0.2


def test_l0_may_vanish() -> None:
    law = fit_scaling_law(N, D, ScalingLaw(0.3, 0.2, 0.5, 0.15, 0.0).loss(N, D))
    assert law.l0 < 0.01 and law.alpha == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("noise", [0.0005, 0.005])
def test_many_fits_at_once_find_what_one_fit_finds(method: str, noise: float) -> None:
    """Levenberg-Marquardt from the true law against curve_fit and L-BFGS from their own starts."""
    sets = np.stack([noisy(noise, seed) for seed in range(5)])
    delta = HUBER_DELTA if method == "huber" else None
    points = Points.of(N, D, sets[0])
    found = np.exp(refit(points, np.log(coefficients(LAW)), sets if delta is None else np.log(sets), delta))
    single = np.stack([coefficients(fit_scaling_law(N, D, losses, method)) for losses in sets])
    np.testing.assert_allclose(found, single, rtol=1e-5 if delta is None else 2e-3)


def test_derivatives_of_the_law() -> None:
    points, logs = Points.of(N, D, LAW.loss(N, D)), np.log(coefficients(LAW))
    losses, derivatives = points.model(logs)
    np.testing.assert_allclose(losses, LAW.loss(N, D), rtol=1e-12)
    for index in range(5):
        step = np.zeros(5)
        step[index] = 1e-6
        slope = (points.model(logs + step)[0] - points.model(logs - step)[0]) / 2e-6
        np.testing.assert_allclose(derivatives[:, index], slope, rtol=1e-6, atol=1e-9)
    assert float(leverage(derivatives).sum()) == pytest.approx(5)


@pytest.fixture(scope="module")
def held() -> dict[float, dict[str, int]]:
    """Of 100 draws, how many intervals hold the truth: by level and name."""
    truth = dataclasses.asdict(LAW) | {"k_squared": LAW.k**2, "eta": LAW.eta}
    truth["tokens_per_parameter"] = LAW.tokens_per_parameter(PUBLISHED_COMPUTE)
    counts = {level: dict.fromkeys(truth, 0) for level in (0.8, 0.99)}
    for draw in range(100):
        found = bootstrap(N, D, noisy(0.002, draw), resamples=400, seed=draw)
        for level, row in counts.items():
            for name, limits in found.summary(level=level).items():
                row[name] += truth[name] in limits
    return counts


def test_99_percent_intervals_hold_the_truth_in_at_least_95_of_100_draws(held: dict[float, dict[str, int]]) -> None:
    """95 % intervals would in every second such test miss it more than 5 times: that is what 95 % means."""
    assert min(held[0.99].values()) >= 95, held[0.99]


def test_80_percent_intervals_hold_the_truth_about_as_often_as_they_say(held: dict[float, dict[str, int]]) -> None:
    """Intervals that always hold would say nothing. One count has a standard error of 4, and they move together."""
    assert 68 <= min(held[0.8].values()) and max(held[0.8].values()) <= 90, held[0.8]


def test_intervals_are_those_of_their_seed_and_narrow_with_the_noise() -> None:
    one = bootstrap(N, D, noisy(0.002, 1), resamples=200)
    assert one == bootstrap(N, D, noisy(0.002, 1), resamples=200)
    assert one.resampled != bootstrap(N, D, noisy(0.002, 1), resamples=200, seed=1).resampled
    assert one.law == fit_scaling_law(N, D, noisy(0.002, 1)) and one.summary()["alpha"].estimate == one.law.alpha
    quiet = bootstrap(N, D, noisy(0.0002, 1), resamples=200)
    wide, narrow = (limits.high - limits.low for limits in (each.summary()["alpha"] for each in (one, quiet)))
    assert narrow < wide / 5
    by_compute = [one.summary(compute)["tokens_per_parameter"].estimate for compute in (1e20, 1e22)]
    assert by_compute == [one.law.tokens_per_parameter(compute) for compute in (1e20, 1e22)]


def test_intervals_of_the_huber_fit_narrow_with_the_noise_too() -> None:
    wide, narrow = (
        bootstrap(N, D, noisy(noise, 1), method="huber", resamples=200).summary()["alpha"] for noise in (0.002, 0.0002)
    )
    assert LAW.alpha in wide and LAW.alpha in narrow
    assert narrow.high - narrow.low < (wide.high - wide.low) / 5


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"method": "newton"}, "unknown method 'newton'; use 'curve_fit' or 'huber'"),
        ({"loss": LAW.loss(N, D)[:-1]}, r"loss: has shape \(35,\), n \(36,\)"),
        ({"n": -N}, "n: has a value that is not positive and finite"),
        ({"loss": np.where(N > 1, np.nan, 0.5)}, "loss: has a value that is not positive and finite"),
        ({"n": N[:5], "d": D[:5], "loss": D[:5]}, "5 points for 5 coefficients"),
        ({"n": np.where(N > 0.2, 1.0, 0.1)}, "n: has fewer than 3 different values"),
    ],
)
def test_refused(change: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        fit_scaling_law(**({"n": N, "d": D, "loss": LAW.loss(N, D)} | change))  # type: ignore[arg-type]


def test_refused_intervals() -> None:
    with pytest.raises(UserError, match="resamples: 10 resamples have no tails"):
        bootstrap(N, D, LAW.loss(N, D), resamples=10)
    found = bootstrap(N, D, noisy(0.002, 0), resamples=100)
    with pytest.raises(UserError, match="level: 95.0 is not between 0 and 1"):
        found.summary(level=95.0)
    with pytest.raises(UserError, match="compute: 0.0 FLOPs"):
        found.summary(0.0)


def test_on_the_library_surface() -> None:
    assert minicpm_megatron.fit_scaling_law is fit_scaling_law
    assert minicpm_megatron.ScalingLaw is ScalingLaw


def test_plain_counts_are_refused_where_1e9_is_meant() -> None:
    """Absolute numbers, as the CSV of `windtunnel fit` has them, gave 0.0 tokens a parameter for 559."""
    loss = LAW.loss(N, D)
    for n, d, name in ((N * 1e9, D * 1e9, "n"), (N * 1e9, D, "n"), (N, D * 1e9, "d")):
        for refused in (lambda n=n, d=d: fit_scaling_law(n, d, loss), lambda n=n, d=d: LAW.loss(n, d)):
            with pytest.raises(UserError, match=f"^{name}: .* is too large for .* in 1e9; divide plain counts by 1e9"):
                refused()
    with pytest.raises(UserError, match="^n: 2.4e.09 is too large"):
        LAW.tokens_for(2.4e9, 0.4)
    with pytest.raises(UserError, match="compute: 1000.0 FLOPs are no compute; give FLOPs, 1e21"):
        LAW.tokens_per_parameter(1000.0)
