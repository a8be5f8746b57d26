"""What the steps around a decay were, and how two windows of them differ.

Steps follow one another and are not independent draws. So a window is cut into `BLOCKS` blocks and limits are those of
block means: right where what one step has to do with another is over within a block. From three seeds on the mean of a
seed is taken instead, which needs no such thing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpm_megatron.methods.intervals import Interval, mean_interval
from minicpm_megatron.training.metrics import GRADIENTS, METRICS, read_metrics
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.progress import is_whole

BLOCKS = 8  # with fewer Student's t grows fast, with more they are short
ENOUGH_SEEDS = 3
Values = NDArray[np.float64]
Steps = Mapping[str, Values]
"""Name in metrics.jsonl -> [steps], "step" among them; nan where nothing was measured."""
Quantity = Callable[[Steps], Values]
"""What is compared: a value a step."""


@dataclass(frozen=True)
class Around:
    """The steps around the decay of one seed.

    Attributes:
        seed: of trunk and decay.
        before: as many steps as the decay has, before it.
        decay: its steps.
        control: the same steps of the trunk, which goes on at the full rate.
        leaves, end: steps done when the decay begins and ends.
    """

    seed: int
    before: Steps
    decay: Steps
    control: Steps
    leaves: int
    end: int

    @property
    def middle(self) -> float:
        """Of the decay."""
        return (self.leaves + self.end) / 2


def read_around(experiment: Experiment) -> list[Around]:
    """Of every seed of which trunk and decay are done, the steps whose gradients were measured."""
    found = []
    for trunk, decay in finished_pairs(experiment):
        leaves, end = decay.first_step, decay.last_step
        whole, decayed = _steps(trunk), _steps(decay)
        both = np.intersect1d(whole["step"], decayed["step"])
        before = _where(whole, whole["step"] <= leaves)
        control, inside = _where(whole, np.isin(whole["step"], both)), _where(decayed, np.isin(decayed["step"], both))
        found.append(Around(decay.labels["seed"], before, inside, control, leaves, end))
    return found


def finished_pairs(experiment: Experiment) -> list[tuple[Cell, Cell]]:
    """(trunk, decay) of every seed whose two runs have come to their ends."""
    by_name = {cell.name: cell for cell in experiment.cells}
    pairs = [(by_name[cell.trunk], cell) for cell in experiment.cells if cell.trunk is not None]
    return [pair for pair in pairs if all(map(is_whole, pair))]


_OF_GRADIENTS = (
    *("gradient_norm", "max_gradient", "gradient_cosine"),
    *("first_derivative", "second_derivative", "curvature", "update_norm"),
)
_NAMES = ("step", "loss", "lr", *_OF_GRADIENTS)


def _steps(cell: Cell) -> Steps:
    trained = {record["step"]: record for record in read_metrics(cell.folder / METRICS, needs=("loss", "lr"))}
    compared = read_metrics(cell.folder / METRICS, GRADIENTS, _OF_GRADIENTS)
    records = [trained[each["step"]] | each for each in compared if each["step"] in trained]
    return {name: np.array([each[name] for each in records], dtype=np.float64) for name in _NAMES}


def _where(steps: Steps, chosen: NDArray[np.bool_]) -> Steps:
    return {name: values[chosen] for name, values in steps.items()}


def logarithm(name: str) -> Quantity:
    """log of the magnitude, for what is compared as a ratio; nan where it is zero."""

    def take(steps: Steps) -> Values:
        magnitude = np.abs(steps[name])
        return np.log(np.where(magnitude > 0, magnitude, np.nan))

    return take


def plain(name: str) -> Quantity:
    """The values as they are."""
    return lambda steps: steps[name]


def positive(name: str) -> Quantity:
    """1 where a value is positive, 0 where it is not: its mean is a share of the steps."""
    return lambda steps: np.where(np.isfinite(steps[name]), steps[name] > 0, np.nan)


@dataclass(frozen=True)
class Contrast:
    """One quantity in the decay, before it, and without it.

    Attributes:
        before, inside, control: means over steps and seeds.
        level: of `inside`.
        change: inside - before.
        against: inside - control, over the same steps.
    """

    before: float
    inside: float
    control: float
    level: Interval
    change: Interval
    against: Interval


def contrast(runs: Sequence[Around], quantity: Quantity, *, late: bool = True) -> Contrast:
    """Compare the second half of the decay (`late`), or all of it."""
    taken = []
    for run in runs:
        inside = run.decay["step"] > (run.middle if late else run.leaves)
        taken.append((quantity(run.before), quantity(run.decay)[inside], quantity(run.control)[inside]))
    return compare(taken)


def compare(taken: Sequence[tuple[Values, Values, Values]]) -> Contrast:
    """The contrast of (before, inside, control) of every seed, each in the order of steps; inside and control pair."""
    before, inside, control = (float(np.nanmean(np.concatenate(each))) for each in zip(*taken, strict=True))
    levels, changes, against = [], [], []
    for past, now, without in taken:
        count = min(BLOCKS, len(now), len(past)) if len(taken) < ENOUGH_SEEDS else 1
        levels += _means(now, count)
        changes += list(np.subtract(_means(now, count), _means(past, count)))
        against += _means(now - without, count)
    return Contrast(before, inside, control, mean_interval(levels), mean_interval(changes), mean_interval(against))


def _means(values: Values, count: int) -> list[float]:
    parts = np.array_split(values, count)
    return [float(np.nanmean(part)) if np.isfinite(part).any() else float("nan") for part in parts]


def lag_one(values: Values) -> float:
    """Correlation of each value with the next."""
    if len(values) < 3 or not np.isfinite(values).all() or np.ptp(values) == 0:
        return float("nan")
    return float(np.corrcoef(values[:-1], values[1:])[0, 1])


def slope(runs: Sequence[Around], over: Quantity, of: Quantity) -> float:
    """Least-squares slope of one quantity over another in the decay, the mean of the seeds."""
    found = []
    for run in runs:
        x, y = over(run.decay), of(run.decay)
        both = np.isfinite(x) & np.isfinite(y)
        found.append(np.polyfit(x[both], y[both], 1)[0] if both.sum() > 2 and np.ptp(x[both]) > 0 else np.nan)
    return float(np.mean(found))
