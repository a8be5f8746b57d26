"""The loss envelope of one model under ever longer training, and of several: section 4.3 of arXiv 2404.06395.

The points are decayed losses over the compute they took. Two forms are fitted with scipy's `curve_fit` as in appendix
B.2, L(C) = beta C^-alpha + L0 and L(C) = alpha e^(-beta C) + L0; the paper finds the power law the better one. The unit
of compute is the caller's, and the coefficients are in it: FLOPs / 1e18 as in figure 10, or tokens of one model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minicpm_megatron.errors import UserError

Array = NDArray[np.float64]
Form = Literal["power", "exponential"]
PARAMETERS = 3
RATES = tuple(np.geomspace(0.02, 50, 40))  # starts for the exponent, or for the rate times the largest compute


@dataclass(frozen=True)
class Envelope:
    """A fitted envelope.

    Attributes:
        form: power for beta C^-alpha + L0, exponential for alpha e^(-beta C) + L0.
        alpha, beta, l0: as in that formula.
        r_squared: share of the losses' variance that it explains.
        aic: Akaike's criterion with Hurvich and Tsai's correction for few points, up to a constant that both forms
            share; the lower form is the better one.
    """

    form: Form
    alpha: float
    beta: float
    l0: float
    r_squared: float
    aic: float

    def loss(self, compute: ArrayLike) -> Array:
        """L at `compute`."""
        c = np.asarray(compute, dtype=np.float64)
        if self.form == "power":
            return np.asarray(self.beta * c**-self.alpha + self.l0)
        return np.asarray(self.alpha * np.exp(-self.beta * c) + self.l0)

    def compute_for(self, loss: float) -> float:
        """C at which the envelope comes down to `loss`; math.inf where it never does, 0 where it begins below.

        >>> round(Envelope("power", 0.5, 2.0, 1.0, 1.0, 0.0).compute_for(2.0), 6)
        4.0
        """
        above = loss - self.l0
        if above <= 0:
            return math.inf
        if self.form == "power":
            with np.errstate(all="ignore"):
                return float(np.float64(self.beta / above) ** np.divide(1.0, self.alpha))
        return max(0.0, float(np.log(self.alpha / above)) / self.beta) if self.alpha and self.beta else math.inf


def fit_envelope(compute: ArrayLike, loss: ArrayLike, form: Form = "power") -> Envelope:
    """Least squares of one form; coefficients are not negative.

    Args:
        compute, loss: [points], above 0.

    Raises:
        UserError: an unknown form, shapes that differ, values that are not positive and finite, fewer than 6 points
            (the corrected criterion needs them), or fewer than 4 different computes.

    >>> compute = [1, 2, 4, 8, 16, 32]
    >>> found = fit_envelope(compute, [0.5 * c**-0.3 + 2 for c in compute])
    >>> round(found.beta, 4), round(found.alpha, 4), round(found.l0, 4)
    (0.5, 0.3, 2.0)
    """
    from scipy.optimize import curve_fit, nnls

    if form not in ("power", "exponential"):
        raise UserError(f"unknown form {form!r}", where="fit_envelope", fix="use 'power' or 'exponential'")
    c, y = _checked(compute, loss)
    if len(c) < PARAMETERS + 3 or len(np.unique(c)) <= PARAMETERS:
        raise UserError(f"{len(c)} points for {PARAMETERS} coefficients", where="fit_envelope", fix="add points")
    # with C in units of its largest value both forms are e^(-rate x) of a known x
    x = np.log(c / c.max()) if form == "power" else c / c.max()

    def model(_: Any, height: float, rate: float, l0: float) -> Array:
        return np.asarray(height * np.exp(-rate * x) + l0)

    def derivatives(_: Any, height: float, rate: float, l0: float) -> Array:
        falling = np.exp(-rate * x)
        return np.stack([falling, -height * x * falling, np.ones_like(x)], axis=-1)

    starts = []
    for rate in RATES:
        (height, l0), residual = nnls(np.stack([np.exp(-rate * x), np.ones_like(x)], axis=-1), y)
        starts.append((residual, (height, rate, l0)))
    start = np.maximum(min(starts)[1], 1e-6 * y.min())
    (height, rate, l0), _ = curve_fit(
        model, x, y, p0=start, jac=derivatives, bounds=(0, np.inf), ftol=1e-14, xtol=1e-14, gtol=1e-14, max_nfev=5000
    )
    rest, points = float(np.sum((y - model(None, height, rate, l0)) ** 2)), len(y)
    free = PARAMETERS + 1  # the noise is estimated, too
    aic = 2 * free + 2 * free * (free + 1) / (points - free - 1)
    aic += points * math.log(rest / points) if rest else -math.inf
    r_squared = 1 - rest / float(np.sum((y - y.mean()) ** 2))
    if form == "power":
        return Envelope(form, float(rate), float(height * c.max() ** rate), float(l0), r_squared, aic)
    return Envelope(form, float(height), float(rate / c.max()), float(l0), r_squared, aic)


def compare_envelopes(compute: ArrayLike, loss: ArrayLike) -> tuple[Envelope, Envelope]:
    """Both forms, the better one (by `aic`) first.

    Raises:
        UserError: as `fit_envelope`.

    >>> compute = [1, 2, 4, 8, 16, 32]
    >>> [each.form for each in compare_envelopes(compute, [0.5 * c**-0.3 + 2 for c in compute])]
    ['power', 'exponential']
    """
    power, exponential = (fit_envelope(compute, loss, form) for form in ("power", "exponential"))
    return (power, exponential) if power.aic <= exponential.aic else (exponential, power)


def optimal_points(compute: ArrayLike, loss: ArrayLike) -> list[int]:
    """Which measured points no other one beats: less loss than every point of no more compute.

    Args:
        compute, loss: [points], above 0, of all models together.

    Returns:
        Their indices by rising compute; the first of equal points.

    Raises:
        UserError: shapes that differ, or values that are not positive and finite.

    >>> optimal_points([1, 2, 3, 4], [3.0, 2.5, 2.6, 2.0])
    [0, 1, 3]
    """
    c, y = _checked(compute, loss)
    found: list[int] = []
    for index in np.lexsort((y, c)):
        if not found or y[index] < y[found[-1]]:
            found.append(int(index))
    return found


def convex_points(compute: ArrayLike, loss: ArrayLike) -> list[int]:
    """Those of `optimal_points` on the lower convex hull in log compute and log loss: the envelope without its dents.

    Raises:
        UserError: as `optimal_points`.

    >>> convex_points([1, 2, 4, 8], [4.0, 3.9, 2.0, 1.9])
    [0, 2, 3]
    """
    c, y = (np.log(column) for column in _checked(compute, loss))
    hull: list[int] = []
    for index in optimal_points(compute, loss):
        while len(hull) > 1:
            a, b = hull[-2:]
            if (y[b] - y[a]) * (c[index] - c[a]) < (y[index] - y[a]) * (c[b] - c[a]):
                break
            hull.pop()
        hull.append(index)
    return hull


def _checked(compute: ArrayLike, loss: ArrayLike) -> tuple[Array, Array]:
    c, y = np.asarray(compute, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if c.ndim != 1 or c.shape != y.shape:
        raise UserError(f"shapes {c.shape} and {y.shape}", where="compute and loss", fix="give equal lengths")
    for name, column in (("compute", c), ("loss", y)):
        if not (np.isfinite(column) & (column > 0)).all():
            raise UserError("has a value that is not positive and finite", where=name, fix="leave that point out")
    return c, y
