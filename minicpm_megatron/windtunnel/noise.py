"""What seeds say about differences between arms of an experiment whose arms share their seeds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpm_megatron.methods.intervals import Interval, t_quantile


@dataclass(frozen=True)
class Noise:
    """How far a run lies from what its arm and its seed make of it.

    A seed decides initial weights and data of all its runs, and moves all arms alike; what is left is the noise of a
    difference between arms: the residual of a randomised block design.

    Attributes:
        deviation: standard deviation of that residual; nan where it is not known (one seed).
        dof: (arms - 1) (seeds - 1).
        seeds: runs of each arm.
    """

    deviation: float
    dof: int
    seeds: int

    @property
    def error(self) -> float:
        """Standard error of the mean of an arm relative to the others'."""
        return self.deviation / math.sqrt(self.seeds)

    def difference(self, first: float, second: float, level: float = 0.95) -> Interval:
        """first - second, two arms' means, with limits by Student's t; infinite where the noise is not known."""
        found = first - second
        if not math.isfinite(self.deviation):
            return Interval(-math.inf, found, math.inf)
        reach = t_quantile(level, self.dof) * self.deviation * math.sqrt(2 / self.seeds)
        return Interval(found - reach, found, found + reach)


def seeds_text(seeds: int) -> str:
    """What a mean over so many is called: "one seed", "mean of 3 seeds"."""
    return f"mean of {seeds} seeds" if seeds > 1 else "one seed"


def noise_of(losses: NDArray[np.float64]) -> Noise:
    """From losses [arms, seeds]; arms with a loss that is not finite are left out.

    >>> noise_of(np.array([[1.0, 1.5], [2.0, 2.5]])).deviation
    0.0
    """
    whole = losses[np.isfinite(losses).all(axis=1)]
    arms, seeds = whole.shape
    dof = (arms - 1) * (seeds - 1)
    if dof < 1:
        return Noise(math.nan, 0, seeds)
    residual = whole - whole.mean(axis=1, keepdims=True) - whole.mean(axis=0, keepdims=True) + whole.mean()
    return Noise(math.sqrt(float((residual**2).sum()) / dof), dof, seeds)
