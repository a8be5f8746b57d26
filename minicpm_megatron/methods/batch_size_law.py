"""The batch size that needs the fewest tokens for a loss: bs = a / L^b, section 3.2 of arXiv 2404.06395.

From runs of several sizes and batch sizes: for each size and loss, the tokens that each batch size needs to reach the
loss (an equal-loss contour); a parabola through log tokens over log batch size, whose minimum is the optimal batch
size; a line through the minima of all sizes and losses, log batch size over log loss. Batch sizes are in tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.methods.polynomial import Line, fit_line, fit_parabola

Array = NDArray[np.float64]


@dataclass(frozen=True)
class BatchSizeLaw:
    """bs = a / L^b.

    Attributes:
        a: tokens at a loss of 1.
        b: how fast the batch grows as the loss falls.
    """

    a: float
    b: float

    def predict(self, loss: float) -> float:
        """Optimal batch size in tokens for an expected loss.

        >>> [round(PUBLISHED.predict(loss) / 1e6, 2) for loss in (2.5, 3.0, 3.5, 4.0)]
        [3.98, 1.28, 0.49, 0.21]
        """
        return float(self.a / loss**self.b)


PUBLISHED = BatchSizeLaw(1.21e9, 6.24)  # section 3.2; C4 loss in nats per token of the paper's tokenizer


@dataclass(frozen=True, eq=False)
class BatchRun:
    """One run: its loss over the tokens it has seen.

    Attributes:
        size: parameters; any unit, it only tells models apart.
        batch: batch size in tokens.
        tokens: [points], rising, above 0.
        loss: [points].
    """

    size: float
    batch: float
    tokens: Array
    loss: Array


@dataclass(frozen=True)
class BatchSizeMinimum:
    """Where the contour of one size and loss is lowest.

    Attributes:
        batch: optimal batch size in tokens.
        batch_interval: its limits by Fieller's theorem from the parabola's residuals.
        tokens: that the optimal batch size needs to reach `loss`.
    """

    size: float
    loss: float
    batch: float
    batch_interval: Interval
    tokens: float


@dataclass(frozen=True)
class BatchSizeFit:
    """A law with what it was made of.

    Attributes:
        line: log bs over log L. Its certainty takes the minima for independent: losses of one size that lie so close
            that the same stretch of a curve decides them make it look better than it is.
    """

    law: BatchSizeLaw
    line: Line
    minima: tuple[BatchSizeMinimum, ...]

    def b_interval(self, level: float = 0.95) -> Interval:
        """b with its limits by Student's t."""
        slope = self.line.slope_interval(level)
        return Interval(-slope.high, -slope.estimate, -slope.low)

    def predict_interval(self, loss: float, level: float = 0.95) -> Interval:
        """The optimal batch size in tokens with its limits; at a loss of 1 those of a."""
        log_batch = self.line.interval_at(math.log(loss), level)
        with np.errstate(over="ignore"):
            return Interval(*(float(np.exp(value)) for value in (log_batch.low, log_batch.estimate, log_batch.high)))


def tokens_to_loss(tokens: ArrayLike, loss: ArrayLike, target: float, *, smooth: int = 1) -> float:
    """Tokens after which a noisy loss curve reaches `target`.

    The curve is averaged over `smooth` neighbouring points, then made falling (isotonic regression), so that it crosses
    every loss once: the first crossing of a noisy curve would be early. A level stretch counts as one point in its
    middle; between points log tokens are interpolated.

    Args:
        tokens, loss: [points]; tokens rising and above 0.
        smooth: points of the average, odd; fewer at both ends, the same number on either side.

    Returns:
        Tokens; nan where the curve ends above `target` or begins below it.

    Raises:
        UserError: shapes that differ, tokens that do not rise, values that are not finite, an even `smooth`.

    >>> tokens_to_loss([1, 10, 100], [4.0, 3.0, 2.0], 2.5).__round__(6)
    31.622777
    """
    from scipy.optimize import isotonic_regression

    xs, ys = np.asarray(tokens, dtype=np.float64), np.asarray(loss, dtype=np.float64)
    if xs.ndim != 1 or xs.shape != ys.shape or not np.isfinite(xs).all() or not np.isfinite(ys).all():
        raise UserError(f"shapes {xs.shape} and {ys.shape}, or a value not finite", where="tokens and loss")
    if not len(xs) or xs[0] <= 0 or (np.diff(xs) <= 0).any():
        raise UserError("do not rise from above 0", where="tokens", fix="sort them, one loss each")
    if smooth < 1 or smooth % 2 == 0:
        raise UserError(f"{smooth} is no odd number of points", where="smooth")
    sums, last = np.concatenate([[0.0], np.cumsum(ys)]), len(ys) - 1
    here = np.arange(len(ys))
    reach = np.minimum(np.minimum(here, last - here), smooth // 2)
    averaged = (sums[here + reach + 1] - sums[here - reach]) / (2 * reach + 1)
    falling = isotonic_regression(averaged, increasing=False).x
    if not falling[-1] <= target <= falling[0]:
        return math.nan
    # np.interp wants rising abscissas
    levels, where = np.unique(-falling, return_inverse=True)
    middles = np.bincount(where, np.log(xs)) / np.bincount(where)
    return float(np.exp(np.interp(-target, levels, middles)))


def contour(runs: Iterable[BatchRun], loss: float, *, smooth: int = 1) -> tuple[Array, Array]:
    """The equal-loss contour of runs of one size.

    Returns:
        Batch sizes in tokens, rising, and the tokens each needs to reach `loss`; runs that do not reach it are left
        out. Both [runs that do].

    Raises:
        UserError: as `tokens_to_loss`.
    """
    reached = sorted((run.batch, tokens_to_loss(run.tokens, run.loss, loss, smooth=smooth)) for run in runs)
    pairs = np.array([pair for pair in reached if not math.isnan(pair[1])]).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def contour_minimum(batches: ArrayLike, tokens: ArrayLike, *, size: float, loss: float) -> BatchSizeMinimum:
    """The minimum of one contour: a parabola of log tokens over log batch size.

    Args:
        batches, tokens: [points], as `contour` returns them.

    Raises:
        UserError: fewer than 3 points, no minimum, or one outside the measured batch sizes.
    """
    log_batch = np.log(np.asarray(batches, dtype=np.float64))
    parabola = fit_parabola(log_batch, np.log(np.asarray(tokens, dtype=np.float64)))
    at, limits = parabola.lowest_at, parabola.lowest_at_interval()
    if not log_batch.min() <= at <= log_batch.max():
        raise UserError(
            f"the best batch size for loss {loss} is outside the measured ones, at {math.exp(at):.3g} tokens",
            where=f"size {size:g}",
            fix="add batch sizes",
        )
    interval = Interval(math.exp(limits.low), math.exp(at), math.exp(limits.high) if limits.high < 700 else math.inf)
    return BatchSizeMinimum(size, loss, math.exp(at), interval, math.exp(parabola.at(at)))


def fit_batch_size_law(runs: Sequence[BatchRun], losses: Iterable[float], *, smooth: int = 1) -> BatchSizeFit:
    """The law from loss curves.

    Args:
        runs: of one size or several.
        losses: at which contours are drawn, for every size; a contour whose minimum its batch sizes do not enclose is
            left out, so that `minima` says what the law rests on.
        smooth: see `tokens_to_loss`.

    Raises:
        UserError: fewer than 3 minima, or all at one loss; faults of the curves as in `tokens_to_loss`.
    """
    minima = []
    for size in sorted({run.size for run in runs}):
        for loss in losses:
            points = contour((run for run in runs if run.size == size), loss, smooth=smooth)
            try:
                minima.append(contour_minimum(*points, size=size, loss=loss))
            except UserError:
                continue
    return fit_minima(minima)


def fit_minima(minima: Sequence[BatchSizeMinimum]) -> BatchSizeFit:
    """The line through minima: log batch size over log loss, all of equal weight.

    Raises:
        UserError: fewer than 3 minima, or all at one loss.
    """
    if len(minima) < 3:
        raise UserError(
            f"{len(minima)} equal-loss contours with a minimum between their batch sizes",
            where="fit_batch_size_law",
            fix="add batch sizes, or losses that more runs reach",
        )
    line = fit_line([math.log(each.loss) for each in minima], [math.log(each.batch) for each in minima])
    return BatchSizeFit(BatchSizeLaw(math.exp(line.at(0.0)), -line.slope), line, tuple(minima))
