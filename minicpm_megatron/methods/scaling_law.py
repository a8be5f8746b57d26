"""L(N, D) = C_N N^-alpha + C_D D^-beta + L0: section 4.5 and figure 10 of arXiv 2404.06395.

Units, here and in `scaling_law_bootstrap`: N parameters without embeddings and D tokens, both in 1e9, as the paper
fits them; compute in FLOPs, C = 6 N D, so that 1e21 FLOPs are 1000 of the paper's 1e18. The loss may be in any unit
(the paper's is per byte), and C_N, C_D and L0 are in the same.

Two fits. `curve_fit` is the paper's: least squares of the loss with scipy's function of that name. `huber` is that of
Hoffmann et al. 2022 (arXiv 2203.15556, approach 3): Huber's loss, delta = 1e-3, of the log of the loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minicpm_megatron.errors import UserError

Method = Literal["curve_fit", "huber"]
Array = NDArray[np.float64]

COMPUTE_UNIT = 1e18  # FLOPs of N and D in 1e9 each
PARAMETERS = 5
LARGEST = {"n": 1e4, "d": 1e9}
"""Numbers in 1e9 that no run has: 1e13 parameters, 1e18 tokens. A larger one was meant as a plain count."""
LEAST_COMPUTE = 1e6
"""FLOPs that any run has; fewer were meant in the paper's 1e18."""
HUBER_DELTA = 1e-3  # Hoffmann et al. 2022, section 3.3
EXPONENTS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5)  # starts for alpha and for beta
STARTS = 4  # of their pairs, how many are followed to the end


@dataclass(frozen=True)
class ScalingLaw:
    """The law and what follows from it in closed form.

    Attributes:
        c_n: C_N, the loss that a lack of parameters costs at N = 1 (1e9).
        alpha: how fast it falls with N.
        c_d: C_D, the loss that a lack of tokens costs at D = 1 (1e9).
        beta: how fast it falls with D.
        l0: what no model gets below.

    >>> law = PUBLISHED["average"].law
    >>> round(float(law.loss(2.4, 1000)), 4)
    0.4267
    >>> round(law.n_opt(1e21), 2), round(law.d_opt(1e21)), round(law.tokens_per_parameter(1e21), 1)
    (0.95, 175, 183.9)
    """

    c_n: float
    alpha: float
    c_d: float
    beta: float
    l0: float

    def loss(self, n: ArrayLike, d: ArrayLike) -> Array:
        """L at N and D in 1e9, which broadcast; 0 is an infinite loss.

        Raises:
            UserError: numbers too large to be in 1e9.
        """
        check_unit("n", n)
        check_unit("d", d)
        with np.errstate(divide="ignore"):
            by_size = self.c_n * np.power(np.asarray(n, dtype=np.float64), -self.alpha)
            by_tokens = self.c_d * np.power(np.asarray(d, dtype=np.float64), -self.beta)
        return np.asarray(by_size + by_tokens + self.l0)

    @property
    def k(self) -> float:
        """K = (alpha C_N / (beta C_D))^(1 / (alpha + beta))."""
        return _exp(self._log_k)

    @property
    def k_squared(self) -> float:
        """K^2, the column of figure 10; infinite where that is too large."""
        return _exp(2 * self._log_k)

    @property
    def eta(self) -> float:
        """(beta - alpha) / (alpha + beta): N_opt / D_opt = K^2 (C / 6)^eta; negative where data deserves more."""
        return (self.beta - self.alpha) / (self.alpha + self.beta)

    def n_opt(self, compute: float) -> float:
        """Parameters in 1e9 that reach the least loss with `compute` FLOPs: K (C/6)^((1 + eta) / 2).

        Raises:
            UserError: no compute.
        """
        return _exp(self._log_k + (1 + self.eta) / 2 * _log_budget(compute))

    def d_opt(self, compute: float) -> float:
        """Tokens in 1e9 that reach the least loss with `compute` FLOPs: (C/6)^((1 - eta) / 2) / K.

        Raises:
            UserError: no compute.
        """
        return _exp(-self._log_k + (1 - self.eta) / 2 * _log_budget(compute))

    def tokens_per_parameter(self, compute: float) -> float:
        """D_opt / N_opt for `compute` FLOPs, the last column of figure 10.

        Raises:
            UserError: no compute.
        """
        return _exp(-2 * self._log_k - self.eta * _log_budget(compute))

    @property
    def _log_k(self) -> float:
        # the product of two coefficients that vanish in a resample would be 0
        upper, lower = math.log(self.alpha) + math.log(self.c_n), math.log(self.beta) + math.log(self.c_d)
        return (upper - lower) / (self.alpha + self.beta)

    def tokens_for(self, n: float, loss: float) -> float:
        """Tokens in 1e9 after which N = `n` reaches `loss`; math.inf where it never does.

        >>> law = PUBLISHED["average"].law
        >>> round(law.tokens_for(2.4, float(law.loss(2.4, 1000))), 6)
        1000.0
        """
        left = loss - float(self.loss(n, math.inf))
        return float((self.c_d / left) ** (1 / self.beta)) if left > 0 else math.inf


@dataclass(frozen=True)
class PublishedLaw:
    """A row of figure 10: rounded coefficients, and what the paper computed before it rounded them."""

    law: ScalingLaw
    k_squared: float
    eta: float
    tokens_per_parameter: float  # at PUBLISHED_COMPUTE


PUBLISHED_COMPUTE = 1e21  # FLOPs
# figure 10; losses per byte
PUBLISHED = {
    "code": PublishedLaw(ScalingLaw(3.32e-2, 0.37, 2.17e-1, 0.34, 0.17), 0.01, -0.05, 194.93),
    "english-wikihow": PublishedLaw(ScalingLaw(8.08e-2, 0.26, 2.97e-1, 0.18, 0.27), 0.02, -0.18, 166.04),
    "chinese-wikihow": PublishedLaw(ScalingLaw(5.14e-2, 0.35, 3.90e-1, 0.18, 0.40), 0.01, -0.33, 833.95),
    "ultratext": PublishedLaw(ScalingLaw(7.54e-2, 0.30, 2.92e-1, 0.30, 0.25), 0.01, 0.00, 95.60),
    "chinese-yayi": PublishedLaw(ScalingLaw(1.53e-1, 0.19, 3.76e-1, 0.17, 0.35), 0.01, -0.05, 112.79),
    "average": PublishedLaw(ScalingLaw(7.15e-2, 0.29, 3.00e-1, 0.23, 0.31), 0.01, -0.10, 191.87),
}


def fit_scaling_law(n: ArrayLike, d: ArrayLike, loss: ArrayLike, method: Method = "curve_fit") -> ScalingLaw:
    """The law that fits measured losses best; all its coefficients are positive.

    The problem is not convex. For given exponents it is linear in the rest, so least squares over a grid of exponents
    finds the starts, and the best of them are followed to the end: by scipy's `curve_fit`, or by L-BFGS on the sum (not
    the mean: with the mean it stops early, as Besiroglu et al. 2024, arXiv 2404.10102, found of the published fit) of
    Huber's losses of log L - LSE(log C_N - alpha log N, log C_D - beta log D, log L0).

    Args:
        n: [points], parameters without embeddings, in 1e9; one point is one decayed checkpoint.
        d: [points], tokens, in 1e9.
        loss: [points], in any unit.
        method: "curve_fit", the paper's least squares, or "huber", that of Hoffmann et al.

    Raises:
        UserError: an unknown method, lengths that differ, values that are not positive and finite, or too large to be
            in 1e9, fewer than 6 points, fewer than 3 sizes or 3 amounts of tokens; or a fit that does not converge.

    >>> law = PUBLISHED["code"].law
    >>> n = [0.1] * 3 + [0.5] * 3 + [2.0] * 3
    >>> d = [1, 3, 6, 5, 15, 30, 20, 60, 120]
    >>> fitted = fit_scaling_law(n, d, law.loss(n, d))
    >>> round(fitted.alpha, 3), round(fitted.l0, 3)
    (0.37, 0.17)
    """
    points = Points.of(n, d, loss)
    if method == "curve_fit":
        return _by_curve_fit(points)
    if method == "huber":
        return _by_huber(points)
    raise UserError(f"unknown method {method!r}", where="fit_scaling_law", fix="use 'curve_fit' or 'huber'")


@dataclass(frozen=True)
class Points:
    """Measured losses, checked: what a fit starts from. Arrays [points] of fp64; logs of N and D in 1e9."""

    log_n: Array
    log_d: Array
    loss: Array

    @classmethod
    def of(cls, n: ArrayLike, d: ArrayLike, loss: ArrayLike) -> Points:
        """Raises UserError: see `fit_scaling_law`."""
        columns = [np.asarray(column, dtype=np.float64) for column in (n, d, loss)]
        for name, column in zip(("n", "d", "loss"), columns, strict=True):
            if column.ndim != 1 or column.shape != columns[0].shape:
                raise UserError(f"has shape {column.shape}, n {columns[0].shape}", where=name, fix="give equal lengths")
            if not (np.isfinite(column) & (column > 0)).all():
                raise UserError("has a value that is not positive and finite", where=name, fix="leave that point out")
        if len(columns[0]) <= PARAMETERS:
            raise UserError(
                f"{len(columns[0])} points for {PARAMETERS} coefficients", where="fit_scaling_law", fix="add points"
            )
        for name, column in (("n", columns[0]), ("d", columns[1])):
            check_unit(name, column)
            if len(np.unique(column)) < 3:
                raise UserError(
                    "has fewer than 3 different values, which cannot tell an exponent from L0",
                    where=name,
                    fix="add points",
                )
        return cls(np.log(columns[0]), np.log(columns[1]), columns[2])

    def model(self, logs: Array) -> tuple[Array, Array]:
        """The law and its derivatives by the logs of its coefficients.

        Args:
            logs: [..., 5], logs of (C_N, alpha, C_D, beta, L0).

        Returns:
            Losses [..., points] and derivatives [..., points, 5].
        """
        log_cn, alpha, log_cd, beta, log_l0 = np.moveaxis(logs, -1, 0)[..., None]
        alpha, beta = np.exp(alpha), np.exp(beta)
        by_size = np.exp(log_cn - alpha * self.log_n)
        by_tokens = np.exp(log_cd - beta * self.log_d)
        rest = np.exp(log_l0) * np.ones_like(by_size)
        columns = (by_size, -alpha * self.log_n * by_size, by_tokens, -beta * self.log_d * by_tokens, rest)
        return by_size + by_tokens + rest, np.stack(columns, axis=-1)


def check_unit(name: str, values: ArrayLike) -> None:
    """Refuse N or D that are plain counts and not in 1e9.

    Args:
        name: "n" or "d".
        values: any shape; infinite ones are allowed.

    Raises:
        UserError: naming the first value that is too large.
    """
    given = np.asarray(values, dtype=np.float64)
    large = given[np.isfinite(given) & (given > LARGEST[name])]
    if large.size:
        what = {"n": "parameters", "d": "tokens"}[name]
        raise UserError(
            f"{large.flat[0]:.4g} is too large for {what} in 1e9", where=name, fix="divide plain counts by 1e9"
        )


def _log_budget(compute: float) -> float:
    """log(C / 6) in the unit of N D."""
    if not LEAST_COMPUTE <= compute < math.inf:
        raise UserError(f"{compute} FLOPs are no compute", where="compute", fix="give FLOPs, 1e21 for the paper's 1e3")
    return math.log(compute / COMPUTE_UNIT / 6)


def _exp(value: float) -> float:
    """e^value; infinite where that is too large, as K is of a resample whose exponents vanish."""
    with np.errstate(over="ignore"):
        return float(np.exp(value))


def _starts(points: Points) -> list[Array]:
    """Coefficients [5] to start from, the best first."""
    from scipy.optimize import nnls

    found = []
    for alpha, beta in product(EXPONENTS, EXPONENTS):
        terms = np.stack(
            [np.exp(-alpha * points.log_n), np.exp(-beta * points.log_d), np.ones_like(points.loss)], axis=-1
        )
        (c_n, c_d, l0), residual = nnls(terms, points.loss)
        # a coefficient of zero has no log, and no way back from there
        found.append((residual, np.maximum([c_n, alpha, c_d, beta, l0], 1e-3 * points.loss.min())))
    return [start for _, start in sorted(found, key=lambda pair: pair[0])[:STARTS]]


def _best(fit: Callable[[Array], tuple[float, Array]], starts: list[Array], method: str) -> ScalingLaw:
    """The best of the fits, (objective, coefficients) each, that converge."""
    fits = []
    for start in starts:
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # a fit that runs away is left out below
                objective, values = fit(start)
        except RuntimeError:  # curve_fit's word for no convergence
            continue
        if math.isfinite(objective) and np.isfinite(values).all():
            fits.append((objective, values))
    if not fits:
        raise UserError("does not converge", where=f"fit_scaling_law, {method}", fix="look at the losses")
    return ScalingLaw(*(float(value) for value in min(fits, key=lambda pair: pair[0])[1]))


def _by_curve_fit(points: Points) -> ScalingLaw:
    from scipy.optimize import curve_fit

    def model(_: Any, *values: float) -> Array:
        return points.model(np.log(values))[0]

    def derivatives(_: Any, *values: float) -> Array:
        slope: Array = points.model(np.log(values))[1] / np.asarray(values)
        return slope

    def fit(start: Array) -> tuple[float, Array]:
        found, _ = curve_fit(
            model,
            points.log_n,
            points.loss,
            p0=start,
            jac=derivatives,
            bounds=(1e-12, np.inf),
            x_scale=start,
            ftol=1e-12,
            xtol=1e-12,
            gtol=1e-14,
            max_nfev=2000,
        )
        return float(np.sum((points.loss - model(None, *found)) ** 2)), found

    return _best(fit, _starts(points), "curve_fit")


def _by_huber(points: Points) -> ScalingLaw:
    from scipy.optimize import minimize

    def fit(start: Array) -> tuple[float, Array]:
        origin = np.log(start)
        values, derivatives = points.model(origin)
        # coordinates in which the problem is round: in the logs themselves L-BFGS takes thousands of steps
        turn = np.linalg.pinv(np.linalg.qr(derivatives / values[:, None] / HUBER_DELTA).R)

        def objective(position: Array) -> tuple[float, Array]:
            values, derivatives = points.model(origin + turn @ position)
            # in units of delta^2, so that L-BFGS's tolerances are far below what a residual contributes
            residuals = (np.log(points.loss) - np.log(values)) / HUBER_DELTA
            pull = np.clip(residuals, -1, 1)
            gradient = -(pull / values / HUBER_DELTA) @ derivatives @ turn
            return float(np.sum(pull * (residuals - pull / 2))), gradient

        options = {"maxiter": 5000, "maxfun": 20_000, "ftol": 1e-14, "gtol": 1e-8}
        done = minimize(objective, np.zeros(PARAMETERS), jac=True, method="L-BFGS-B", options=options)
        return float(done.fun), np.exp(origin + turn @ done.x)

    return _best(fit, _starts(points), "huber")


def coefficients(law: ScalingLaw) -> Array:
    """(C_N, alpha, C_D, beta, L0) as an array [5]."""
    return np.array(astuple(law))
