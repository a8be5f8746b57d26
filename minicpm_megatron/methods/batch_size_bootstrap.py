"""How well runs determine the batch-size law: bootstrap limits that know which points belong to one run.

A run that is ahead at one loss is ahead at the next: the points of a run share their noise over all contours, and so
do the minima of a size. Limits that take minima for independent (`BatchSizeFit`) are too narrow for contours that lie
close. Here every run's residuals about the parabolas keep their pattern over the losses and are multiplied by one
random weight a run (a wild cluster bootstrap; Webb's six weights, for few clusters); parabolas, minima and the line
through them are made anew from the result.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.batch_size_law import (
    Array,
    BatchRun,
    BatchSizeFit,
    BatchSizeMinimum,
    contour_minimum,
    fit_minima,
    tokens_to_loss,
)
from minicpm_megatron.methods.intervals import Interval, percentile_interval
from minicpm_megatron.methods.polynomial import fit_parabola

LEAST_POINTS = 4
"""Points of a contour whose minimum is used: one more than a parabola has coefficients."""
WEBB = (-math.sqrt(1.5), -1.0, -math.sqrt(0.5), math.sqrt(0.5), 1.0, math.sqrt(1.5))
"""Weights of mean 0 and variance 1 (Webb 2014, 'Reworking wild bootstrap based inference for clustered errors')."""


@dataclass(frozen=True, eq=False)
class Contour:
    """What runs of one size need to reach one loss.

    Attributes:
        size: parameters.
        loss: of the contour.
        runs: [points], numbers of the runs that reach it, by rising batch size.
        batch: [points], in tokens.
        tokens: [points], until the loss is reached.
        minimum: None where the batch sizes do not enclose it.
        beyond: where its parabola is lowest otherwise: beyond the smallest batch size, beyond the largest, or nowhere,
            as the points are too few or bend downwards.
    """

    size: float
    loss: float
    runs: Sequence[int]
    batch: Array
    tokens: Array
    minimum: BatchSizeMinimum | None
    beyond: Literal["", "smallest", "largest"] = ""

    @property
    def is_enough(self) -> bool:
        """Whether there are points enough to look for a minimum."""
        return len(set(self.batch.tolist())) >= LEAST_POINTS


def equal_loss_contours(runs: Sequence[BatchRun], losses: Iterable[float], *, smooth: int = 1) -> list[Contour]:
    """The contours of every size at every loss that at least one of its runs reaches.

    Args:
        runs: of one size or several; several of one size and batch size (seeds) are as many points.
        smooth: see `tokens_to_loss`.

    Raises:
        UserError: faults of the curves as in `tokens_to_loss`.
    """
    found = []
    wanted = sorted(losses, reverse=True)
    for size in sorted({run.size for run in runs}):
        own = sorted((run.batch, number) for number, run in enumerate(runs) if run.size == size)
        for loss in wanted:
            needed = {
                number: tokens_to_loss(runs[number].tokens, runs[number].loss, loss, smooth=smooth) for _, number in own
            }
            reached = [number for _, number in own if not math.isnan(needed[number])]
            if reached:
                batch = np.array([runs[number].batch for number in reached])
                tokens = np.array([needed[number] for number in reached])
                found.append(_contour(size, loss, reached, batch, tokens))
    return found


def _contour(size: float, loss: float, reached: Sequence[int], batch: Array, tokens: Array) -> Contour:
    found = Contour(size, loss, tuple(reached), batch, tokens, None)
    if not found.is_enough:
        return found
    try:
        return replace(found, minimum=contour_minimum(batch, tokens, size=size, loss=loss))
    except UserError:
        pass
    try:
        lowest = fit_parabola(np.log(batch), np.log(tokens)).lowest_at
    except UserError:
        return found
    return replace(found, beyond="smallest" if lowest < np.log(batch).mean() else "largest")


@dataclass(frozen=True, eq=False)
class BootstrappedBatchSize:
    """A law with the laws that it could as well have been.

    Attributes:
        fit: the line through the minima of all sizes.
        b_at_size: b of lines that are parallel, one a size; nan where the minima are of one size, or too few.
        size_slope: log best batch over log size at equal loss, how far those lines lie apart; nan likewise.
        slopes, levels: [resamples], of the lines log best batch over log loss; nan where a resample has no line.
        b_at_sizes, size_slopes: [resamples].
        dof: runs less coefficients of a parabola for every size.
    """

    fit: BatchSizeFit
    b_at_size: float
    size_slope: float
    slopes: Array
    levels: Array
    b_at_sizes: Array
    size_slopes: Array
    dof: int

    def b_interval(self, level: float = 0.95) -> Interval:
        """b with its limits."""
        return self._interval(self.fit.law.b, -self.slopes, level)

    def b_at_size_interval(self, level: float = 0.95) -> Interval | None:
        """`b_at_size` with its limits; None where it is not known."""
        return None if math.isnan(self.b_at_size) else self._interval(self.b_at_size, self.b_at_sizes, level)

    def predict_interval(self, loss: float, level: float = 0.95) -> Interval:
        """The optimal batch size in tokens with its limits; at a loss of 1 those of a."""
        log_batch = self.levels + self.slopes * math.log(loss)
        found = self._interval(math.log(self.fit.law.predict(loss)), log_batch, level)
        with np.errstate(over="ignore"):
            return Interval(*(float(np.exp(value)) for value in (found.low, found.estimate, found.high)))

    def size_interval(self, level: float = 0.95) -> Interval | None:
        """`size_slope` with its limits: 0 where the minima of all sizes lie on one line; None where it is not known."""
        return None if math.isnan(self.size_slope) else self._interval(self.size_slope, self.size_slopes, level)

    def _interval(self, estimate: float, resampled: Array, level: float) -> Interval:
        # what has no line says nothing, on both sides
        nothing = np.flatnonzero(np.isnan(resampled))
        whole = resampled.copy()
        whole[nothing[::2]], whole[nothing[1::2]] = -math.inf, math.inf
        return percentile_interval(estimate, whole, level, self.dof)


def bootstrap(contours: Sequence[Contour], *, resamples: int = 1000, seed: int = 0) -> BootstrappedBatchSize:
    """Fit the law to the minima of contours and say how certain it is; the same arguments give the same limits.

    A resample's minimum counts wherever it lies: left out beyond the batch sizes, one at the end of the grid could only
    move inwards, and the limits would be shifted.

    Args:
        contours: as `equal_loss_contours` returns them; those without a minimum are left out.

    Raises:
        UserError: fewer than 3 minima, or all at one loss.
    """
    kept = [each for each in contours if each.minimum is not None]
    fit = fit_minima([each.minimum for each in kept if each.minimum is not None])
    used = sorted({run for each in kept for run in each.runs})
    place = {run: number for number, run in enumerate(used)}
    weights = np.random.default_rng(seed).choice(WEBB, (resamples, len(used)))
    minima = np.stack([_resampled_minima(each, weights[:, [place[run] for run in each.runs]]) for each in kept], axis=1)
    log_loss = np.log([each.loss for each in kept])
    log_size = np.log([each.size for each in kept])
    ones = np.ones_like(log_loss)
    lines = _least_squares(np.stack([ones, log_loss], axis=1), minima)
    sizes = len(set(log_size.tolist()))
    plane, resampled = np.full(3, np.nan), np.full((resamples, 3), np.nan)
    if sizes > 1:
        planes = np.stack([ones, log_loss, log_size], axis=1)
        log_batch = np.log([minimum.batch for minimum in fit.minima])
        plane, resampled = _least_squares(planes, log_batch[None])[0], _least_squares(planes, minima)
    return BootstrappedBatchSize(
        fit=fit,
        b_at_size=-float(plane[1]),
        size_slope=float(plane[2]),
        slopes=lines[:, 1],
        levels=lines[:, 0],
        b_at_sizes=-resampled[:, 1],
        size_slopes=resampled[:, 2],
        dof=max(1, len(used) - 3 * sizes),
    )


def _resampled_minima(contour: Contour, weights: Array) -> Array:
    """[resamples], log batch size of the minimum; nan where the parabola has none.

    Args:
        weights: [resamples, points].
    """
    x, y = np.log(contour.batch), np.log(contour.tokens)
    centre = x.mean()
    powers = (x - centre)[:, None] ** np.arange(3)
    solve = np.linalg.pinv(powers)
    hat = powers @ solve
    fitted = hat @ y
    # a fit makes residuals smaller than the noise
    residuals = (y - fitted) / np.sqrt(np.maximum(1 - np.diag(hat), 1 / len(x)))
    coefficients = (fitted + weights * residuals) @ solve.T
    with np.errstate(divide="ignore", invalid="ignore"):
        lowest = centre - coefficients[:, 1] / (2 * coefficients[:, 2])
    return np.where(coefficients[:, 2] > 0, lowest, np.nan)


def _least_squares(design: Array, targets: Array) -> Array:
    """[sets, coefficients] of many sets of points with some left out (nan); nan where what is left tells too little.

    Args:
        design: [points, coefficients].
        targets: [sets, points].
    """
    there = np.isfinite(targets)
    matrix = np.einsum("sp,pi,pj->sij", there, design, design)
    pull = np.einsum("sp,pi->si", np.where(there, targets, 0.0), design)
    found = np.full((len(targets), design.shape[1]), np.nan)
    enough = (there.sum(axis=1) >= design.shape[1] + 1) & (np.linalg.cond(matrix) < 1e10)
    found[enough] = np.linalg.solve(matrix[enough], pull[enough][..., None])[..., 0]
    return found
