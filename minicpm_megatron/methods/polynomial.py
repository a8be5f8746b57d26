"""Lines and parabolas through measured points, with what the noise of the points leaves open.

Least squares of equally noisy points. The noise is either given (from seeds) or estimated from the residuals; with as
many points as coefficients there are no residuals, and without a given noise nothing can be said about the certainty.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.intervals import Interval, t_quantile

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Polynomial:
    """y = sum of coefficients[k] (x - centre)^k.

    Attributes:
        coefficients: [degree + 1], the constant first.
        covariance: of the coefficients, [degree + 1, degree + 1]; nan where the noise is unknown.
        centre: mean of the x that it was fitted to.
        dof: degrees of freedom of the noise's estimate; math.inf for a given noise.
    """

    coefficients: Array
    covariance: Array
    centre: float
    dof: float

    def at(self, x: float) -> float:
        """y at x."""
        return float(self._powers(x) @ self.coefficients)

    def interval_at(self, x: float, level: float = 0.95) -> Interval:
        """y at x, with the limits of the curve (not of a new point) by Student's t; infinite for an unknown noise."""
        powers, y = self._powers(x), self.at(x)
        return _around(y, math.sqrt(float(powers @ self.covariance @ powers)), level, self.dof)

    def _powers(self, x: float) -> Array:
        return np.asarray((x - self.centre) ** np.arange(len(self.coefficients)), dtype=np.float64)


@dataclass(frozen=True)
class Line(Polynomial):
    """y = intercept + slope x."""

    @property
    def slope(self) -> float:
        return float(self.coefficients[1])

    @property
    def slope_error(self) -> float:
        """Standard error of the slope; nan for an unknown noise."""
        return math.sqrt(float(self.covariance[1, 1]))

    def slope_interval(self, level: float = 0.95) -> Interval:
        """The slope with its limits by Student's t; infinite for an unknown noise."""
        return _around(self.slope, self.slope_error, level, self.dof)


@dataclass(frozen=True)
class Parabola(Polynomial):
    """A parabola that opens upwards: what is asked for is where it is lowest."""

    @property
    def lowest_at(self) -> float:
        """x of the minimum."""
        _, slope, bend = self.coefficients
        return float(self.centre - slope / (2 * bend))

    @property
    def lowest_at_error(self) -> float:
        """Standard error of `lowest_at` by the delta method; nan for an unknown noise."""
        _, slope, bend = self.coefficients
        gradient = np.array([0.0, -1 / (2 * bend), slope / (2 * bend**2)])
        return math.sqrt(float(gradient @ self.covariance @ gradient))

    def lowest_at_interval(self, level: float = 0.95) -> Interval:
        """`lowest_at` with its limits by Fieller's theorem, exact for normal noise.

        The derivative at v, slope + 2 bend v, is normal and its mean is zero at the true minimum: the interval holds
        every v whose derivative does not differ from zero by more than Student's t allows. It is everything where
        `bend` itself could be zero, and for an unknown noise.
        """
        _, slope, bend = self.coefficients
        t2 = t_quantile(level, self.dof) ** 2 if self.dof > 0 else math.inf
        everything = Interval(-math.inf, self.lowest_at, math.inf)
        if math.isinf(t2):
            return everything
        (s2, cross), (_, b2) = self.covariance[1:, 1:]
        square, linear, constant = 4 * (bend**2 - t2 * b2), 4 * (slope * bend - t2 * cross), slope**2 - t2 * s2
        inside = linear**2 - 4 * square * constant
        if square <= 0 or inside < 0:
            return everything
        middle, half = self.centre - linear / (2 * square), math.sqrt(inside) / (2 * square)
        return Interval(middle - half, self.lowest_at, middle + half)


def fit_line(x: ArrayLike, y: ArrayLike, *, noise: float | None = None) -> Line:
    """The line through points.

    Args:
        x, y: [points].
        noise: standard deviation of each y; None: from the residuals.

    Raises:
        UserError: fewer than 2 different x.

    >>> line = fit_line([0, 1, 2, 3], [1, 3, 5, 7])
    >>> round(line.slope, 6), round(line.at(10), 6)
    (2.0, 21.0)
    """
    return Line(*_fit(x, y, 1, noise))


def fit_parabola(x: ArrayLike, y: ArrayLike, *, noise: float | None = None, noise_dof: float = math.inf) -> Parabola:
    """The parabola through points.

    Args:
        x, y: [points].
        noise: standard deviation of each y; None: from the residuals.
        noise_dof: degrees of freedom that a given noise was estimated with.

    Raises:
        UserError: fewer than 3 different x, or a parabola without a minimum.

    >>> parabola = fit_parabola([0, 1, 2, 3, 4], [5, 2, 1, 2, 5], noise=0.1)
    >>> round(parabola.lowest_at, 6), round(parabola.lowest_at_error, 4)
    (2.0, 0.0158)
    """
    found = Parabola(*_fit(x, y, 2, noise, noise_dof))
    if not found.coefficients[2] > 0:
        raise UserError("has no minimum", where="the parabola", fix="measure further on both sides, or more exactly")
    return found


def _fit(
    x: ArrayLike, y: ArrayLike, degree: int, noise: float | None, noise_dof: float = math.inf
) -> tuple[Array, Array, float, float]:
    xs, ys = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if xs.ndim != 1 or xs.shape != ys.shape or not (np.isfinite(xs) & np.isfinite(ys)).all():
        raise UserError(f"shapes {xs.shape} and {ys.shape}, or a value not finite", where="x and y")
    if len(np.unique(xs)) <= degree:
        raise UserError(f"fewer than {degree + 1} different values", where="x", fix="add points")
    centre = float(xs.mean())
    powers = (xs - centre)[:, None] ** np.arange(degree + 1)
    inverse: Array = np.asarray(np.linalg.inv(powers.T @ powers), dtype=np.float64)
    found = inverse @ powers.T @ ys
    spare = len(xs) - degree - 1
    if noise is not None:
        variance, dof = noise**2, noise_dof
    else:
        variance = float(np.sum((ys - powers @ found) ** 2)) / spare if spare else math.nan
        dof = spare
    return found, variance * inverse, centre, dof


def _around(estimate: float, error: float, level: float, dof: float) -> Interval:
    reach = t_quantile(level, dof) * error if dof > 0 and not math.isnan(error) else math.inf
    return Interval(estimate - reach, estimate, estimate + reach)
