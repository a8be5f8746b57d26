"""The best learning rate and whether it moves with the size of a model: section 3.3 of arXiv 2404.06395.

The loss over log2 of the rate is taken for a parabola near its minimum. Over sizes, the optimum's shift is one number:
the slope of log2 of the best rate over log2 of the size, 0 where rates transfer and -1 where they fall with the width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.methods.polynomial import Line, Parabola, fit_line, fit_parabola


@dataclass(frozen=True)
class RateOptimum:
    """The rate with the least loss.

    Attributes:
        rate: in the unit of the rates it was found among.
        loss: of the parabola at `rate`.
        octaves_error: standard error of log2 of `rate`, by the delta method; nan where nothing tells the noise.
        points: how many rates the parabola goes through.
        parabola: loss over log2 of the rate.
    """

    rate: float
    loss: float
    octaves_error: float
    points: int
    parabola: Parabola

    def interval(self, level: float = 0.95) -> Interval:
        """The rate with its limits by Fieller's theorem: 0 to infinity where the noise hides the minimum."""
        limits = self.parabola.lowest_at_interval(level)
        return Interval(2.0**limits.low, self.rate, 2.0**limits.high if limits.high < 1000 else math.inf)


@dataclass(frozen=True)
class RateShift:
    """How far the best rate moves over sizes.

    Attributes:
        slope: of log2 best rate over log2 size: octaves of the rate an octave of the size.
        spread: octaves between the highest and the lowest best rate.
        line: log2 best rate over log2 size.
    """

    slope: float
    spread: float
    line: Line

    def slope_interval(self, level: float = 0.95) -> Interval:
        """The slope with its limits by Student's t from how the optima scatter about the line; infinite for 2 sizes."""
        return self.line.slope_interval(level)


def optimal_rate(rates: ArrayLike, losses: ArrayLike, *, window: int = 2, noise: float | None = None) -> RateOptimum:
    """The minimum of the parabola through the best rate and `window` rates on each side of it, where there are as many.

    How noisy a loss is comes from `noise`, else from the scatter of several seeds, else from the residuals of the
    parabola. The last is the only one that also counts how little a wide window is a parabola.

    Args:
        rates: [rates], all different; the closer to equal steps of the log the better.
        losses: [rates], or [seeds, rates]: then their means are fitted. Runs that diverged may be nan or infinite;
            their rates are left out.
        noise: standard deviation of the loss of one run.

    Raises:
        UserError: shapes that differ, rates that are not positive, a window or noise below 1 or 0, or a best rate at
            the end of the grid or off the rates of the parabola.

    >>> rates = [0.0025, 0.005, 0.01, 0.02, 0.04]
    >>> found = optimal_rate(rates, [2.14, 2.06, 2.02, 2.02, 2.06], noise=0.01)
    >>> round(found.rate, 4), round(found.octaves_error, 2)
    (0.0141, 0.1)
    """
    table = np.atleast_2d(np.asarray(losses, dtype=np.float64))
    grid = np.asarray(rates, dtype=np.float64)
    if grid.ndim != 1 or table.shape[1:] != grid.shape:
        raise UserError(f"shape {np.shape(losses)} for {grid.shape} rates", where="losses")
    if not (grid > 0).all() or len(np.unique(grid)) < len(grid):
        raise UserError("not all positive and different", where="rates")
    if window < 1 or (noise is not None and not noise >= 0):
        raise UserError(f"window {window}, noise {noise}", where="optimal_rate", fix="give at least 1, and 0 or more")
    order = np.argsort(grid)
    kept = order[np.isfinite(table[:, order]).all(axis=0)]
    means, seeds = table[:, kept].mean(axis=0), len(table)
    best = int(np.argmin(means)) if len(kept) else 0
    if not 0 < best < len(kept) - 1:
        what = f"the best rate, {grid[kept[best]]:g}, is the last on its side" if len(kept) else "nothing converged"
        raise UserError(what, where="rates", fix="add rates on both sides")
    near = slice(max(0, best - window), best + window + 1)
    dof = math.inf
    if noise is None and seeds > 1:
        noise, dof = math.sqrt(float(table[:, kept].var(axis=0, ddof=1).mean())), len(kept) * (seeds - 1)
    parabola = fit_parabola(
        np.log2(grid[kept[near]]),
        means[near],
        noise=None if noise is None else noise / math.sqrt(seeds),
        noise_dof=dof,
    )
    at = parabola.lowest_at
    first, last = np.log2(grid[kept[near]])[[0, -1]]
    if not first <= at <= last:
        raise UserError(
            f"the parabola is lowest at {2.0**at:.3g}, off its rates {2**first:g} to {2**last:g}",
            where="losses",
            fix="give several seeds, or a window of 1",
        )
    return RateOptimum(2.0**at, parabola.at(at), parabola.lowest_at_error, len(means[near]), parabola)


def rate_shift(sizes: ArrayLike, best_rates: ArrayLike) -> RateShift:
    """How the best rate moves over sizes, widths or depths.

    Args:
        sizes, best_rates: [sizes], above 0.

    Raises:
        UserError: fewer than 2 different sizes, or values that are not positive.

    >>> shift = rate_shift([64, 128, 256], [0.008, 0.004, 0.002])
    >>> round(shift.slope, 6), round(shift.spread, 6)
    (-1.0, 2.0)
    """
    widths, optima = np.asarray(sizes, dtype=np.float64), np.asarray(best_rates, dtype=np.float64)
    if not (widths > 0).all() or not (optima > 0).all():
        raise UserError("not all positive", where="sizes and best_rates")
    line = fit_line(np.log2(widths), np.log2(optima))
    return RateShift(line.slope, float(np.ptp(np.log2(optima))), line)
