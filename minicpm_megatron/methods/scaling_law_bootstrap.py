"""How well a set of runs determines the scaling law: bootstrap intervals of its coefficients and of what follows.

A residual bootstrap. The fitted law plus its own residuals, drawn anew for every point, is fitted again, a thousand
times; intervals are expanded percentiles (`intervals.percentile_interval`). A fit makes residuals smaller than the
noise: those of `curve_fit` are enlarged by their leverage, of those of `huber` the five smallest are left out. Whole
points are not drawn: six sizes and six lengths are a design, and a resample without the largest size would be another.

Residuals are taken for independent and of one size: absolute for `curve_fit`, relative for `huber`, which is what each
fit assumes itself. Checkpoints of one stable run share their history; where that moves a whole size up or down the
intervals are too narrow, and only a second seed of the run shows it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from operator import attrgetter

import numpy as np
from numpy.typing import ArrayLike

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.intervals import Interval, percentile_interval
from minicpm_megatron.methods.scaling_law import (
    HUBER_DELTA,
    PARAMETERS,
    PUBLISHED_COMPUTE,
    Array,
    Method,
    Points,
    ScalingLaw,
    coefficients,
    fit_scaling_law,
)

ROUNDS = 300  # of Levenberg-Marquardt at most; 10 to 40 are usual


@dataclass(frozen=True)
class BootstrappedLaw:
    """A fitted law with the laws that it could as well have been.

    Attributes:
        law: the fit to the measured losses.
        resampled: the fits to the resamples.
        dof: points less fitted coefficients.
    """

    law: ScalingLaw
    resampled: tuple[ScalingLaw, ...]
    dof: int

    def interval(self, of: Callable[[ScalingLaw], float], level: float = 0.95) -> Interval:
        """The limits of anything that follows from the law: `lambda law: law.tokens_per_parameter(1e21)`.

        Raises:
            UserError: a level out of range.
        """
        return percentile_interval(of(self.law), np.array([of(law) for law in self.resampled]), level, self.dof)

    def summary(self, compute: float = PUBLISHED_COMPUTE, level: float = 0.95) -> dict[str, Interval]:
        """The limits of c_n, alpha, c_d, beta, l0, k_squared, eta, and tokens_per_parameter for `compute` FLOPs.

        Units as in `scaling_law`. Each interval holds for itself: all together hold less often than `level`.

        Raises:
            UserError: no compute, or a level out of range.
        """
        asked: dict[str, Callable[[ScalingLaw], float]] = {
            **{field.name: attrgetter(field.name) for field in fields(ScalingLaw)},
            "k_squared": lambda law: law.k_squared,
            "eta": lambda law: law.eta,
            "tokens_per_parameter": lambda law: law.tokens_per_parameter(compute),
        }
        return {name: self.interval(of, level) for name, of in asked.items()}


def bootstrap(
    n: ArrayLike,
    d: ArrayLike,
    loss: ArrayLike,
    *,
    method: Method = "curve_fit",
    resamples: int = 1000,
    seed: int = 0,
) -> BootstrappedLaw:
    """Fit the law and say how certain it is; the same arguments give the same intervals.

    Args:
        n, d, loss: as for `fit_scaling_law`.
        resamples: 1000 are enough for 95 %.

    Raises:
        UserError: as `fit_scaling_law`; fewer than 100 resamples.

    >>> from minicpm_megatron.methods.scaling_law import PUBLISHED
    >>> n = np.repeat([0.04, 0.1, 0.3, 0.5, 0.85, 2.0], 6)
    >>> d = n * np.tile([10, 20, 30, 40, 50, 60], 6)
    >>> noise = 0.001 * np.random.default_rng(0).standard_normal(36)
    >>> known = PUBLISHED["average"].law
    >>> found = bootstrap(n, d, known.loss(n, d) + noise)
    >>> limits = found.summary()
    >>> known.alpha in limits["alpha"], known.eta in limits["eta"]
    (True, True)
    >>> known.loss(5, 500) in found.interval(lambda law: float(law.loss(5, 500)))
    True
    """
    if resamples < 100:
        raise UserError(f"{resamples} resamples have no tails", where="resamples", fix="give 100 or more")
    law = fit_scaling_law(n, d, loss, method)
    points, delta = Points.of(n, d, loss), HUBER_DELTA if method == "huber" else None
    start = np.log(coefficients(law))
    fitted, derivatives = points.model(start)
    if delta is None:
        centre, residuals = fitted, points.loss - fitted
        pool = residuals / np.sqrt(np.maximum(1 - leverage(derivatives), 1 / len(residuals)))
    else:
        centre, residuals = np.log(fitted), np.log(points.loss) - np.log(fitted)
        # where delta is small beside the noise, the fit goes through as many points as it has coefficients
        pool = residuals[np.argsort(np.abs(residuals))[PARAMETERS:]]
    drawn = np.random.default_rng(seed).choice(pool - pool.mean(), (resamples, len(residuals)))
    logs = refit(points, start, centre + drawn, delta)
    resampled = tuple(ScalingLaw(*row) for row in np.exp(logs).tolist())
    return BootstrappedLaw(law, resampled, len(residuals) - PARAMETERS)


def leverage(derivatives: Array) -> Array:
    """[points]: how much of each residual the fit takes away, between 0 and 1; `derivatives` is [points, 5]."""
    scaled = derivatives / np.linalg.norm(derivatives, axis=0)
    basis, sizes, _ = np.linalg.svd(scaled, full_matrices=False)
    return np.asarray(np.sum(basis[:, sizes > 1e-12 * sizes[0]] ** 2, axis=-1))


def refit(points: Points, start: Array, targets: Array, delta: float | None) -> Array:
    """The fits of many sets of losses at once, by Levenberg-Marquardt from one start.

    Args:
        start: [5], logs of the coefficients.
        targets: [sets, points]: losses, or with `delta` their logs.
        delta: of Huber's loss (by iteratively reweighted least squares); None: least squares.

    Returns:
        [sets, 5], logs of the coefficients.
    """

    def evaluate(logs: Array, wanted: Array) -> tuple[Array, Array, Array]:
        """Objective [sets], weighted residuals' pull [sets, 5] and its matrix [sets, 5, 5]."""
        values, slopes = points.model(logs)
        if delta is None:
            residuals = wanted - values
            weighted, objective = slopes, np.sum(residuals**2, axis=-1)
        else:
            slopes = slopes / values[..., None]
            residuals = wanted - np.log(values)
            size = np.abs(residuals)
            objective = np.sum(np.where(size < delta, size**2, delta * (2 * size - delta)), axis=-1)
            weighted = slopes * np.minimum(1, delta / np.maximum(size, 1e-300))[..., None]
        turned = np.swapaxes(weighted, -1, -2)
        return objective, (turned @ residuals[..., None])[..., 0], turned @ slopes

    logs = np.tile(start, (len(targets), 1))
    objective, pull, matrix = evaluate(logs, targets)
    damping = np.full(len(targets), 1e-3)
    running = np.arange(len(targets))
    for _ in range(ROUNDS):
        diagonal = np.einsum("bii->bi", matrix[running])
        shifted = matrix[running] + (damping[running, None] * diagonal + 1e-300)[..., None] * np.eye(PARAMETERS)
        # a coefficient on its way to 0 goes there in steps
        step = np.clip(np.linalg.solve(shifted, pull[running][..., None])[..., 0], -1, 1)
        new = logs[running] + step
        new_objective, new_pull, new_matrix = evaluate(new, targets[running])
        better = new_objective <= objective[running]
        gain = objective[running] - new_objective
        finished = (better & (gain <= 1e-9 * objective[running])) | (damping[running] > 1e8)
        moved = running[better]
        logs[moved], objective[moved] = new[better], new_objective[better]
        pull[moved], matrix[moved] = new_pull[better], new_matrix[better]
        damping[running] = np.where(better, np.maximum(damping[running] / 5, 1e-12), damping[running] * 5)
        running = running[~finished]
        if not len(running):
            break
    return logs
