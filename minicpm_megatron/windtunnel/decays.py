"""Warmup-Stable-Decay against Cosine: sections 4.1 to 4.3, figures 4 and 5.

One trunk at the full rate; from its checkpoints a decay for every length of training, share of it that is decay, and
shape; beside them Cosine(T) for T below, at and above S, and CosineLoop(T) for T below S. All that end at the same
length are compared at that length: a decay of a share d of E tokens leaves the trunk (1 - d) E before, so that a longer
decay is not a longer training. Cosine(T) is the same run whatever its length up to T, so Cosine(E) is read where it
reaches E.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import BatchPlan, Recipe
from minicpm_megatron.recipe.checks import SHAPES_WITHOUT_HALF_LIFE
from minicpm_megatron.windtunnel.cells import Cell, make_cell
from minicpm_megatron.windtunnel.decays_findings import evaluate_decays
from minicpm_megatron.windtunnel.experiment import Experiment

KIND = "wsd"
SHARES = (0.025, 0.05, 0.1, 0.2)  # section 4.3 names the first and the third
HALF_LIVES = 5.0
"""Half-lives in an exponential decay, which ends at 1/32 of the rate: ours, the wind tunnel's own is not published."""
_EVALUATIONS, _MOST_EVALUATIONS = 20, 100  # of the longest run, for the curves


@dataclass(frozen=True)
class DecaySettings:
    """What is asked for.

    Attributes:
        ends: lengths of training that are compared, as shares of the recipe's; the largest is 1, which is S.
        shares: of a length, that is decay.
        shapes: names of decay shapes.
        periods: T of the cosines as shares of S; each of `ends` is added.
        seeds: each decides initial weights and sample order.
    """

    ends: tuple[float, ...]
    shares: tuple[float, ...]
    shapes: tuple[str, ...]
    periods: tuple[float, ...]
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        _require(_different(self.ends) and max(self.ends) == 1, "--ends", "not different shares of which 1 is largest")
        _require(_different(self.shares) and max(self.shares) < 1, "--shares", "not different shares below 1")
        _require(len(set(self.shapes)) == len(self.shapes), "--shapes", "not different shapes")
        _require(_different(self.periods), "--periods", "not different positive shares")
        _require(len(set(self.seeds)) == len(self.seeds), "--seeds", "not different seeds")

    def all_periods(self) -> tuple[float, ...]:
        """T of every cosine, rising."""
        return tuple(sorted({*self.periods, *self.ends}))


def plan_decays(base: Recipe, settings: DecaySettings, output: Path) -> Experiment:
    """Trunks, branches and cosines.

    Raises:
        UserError: a share that is not a step, a decay that would begin in the warmup, an unknown shape, or a batch
            that grows.
    """
    _require(not base.training.batch_growth, "training.batch_growth", "lengths of decays are shares of equal steps")
    steps = BatchPlan(base).total_steps()
    lengths = Lengths(base, steps, settings.ends)
    ends = {end: lengths.steps(end, "--ends") for end in settings.ends}
    for at in ends.values():
        _check_shares(lengths, at, settings.shares)
    cells: list[Cell] = []
    for seed in settings.seeds:
        trunk = _trunk(base, output, lengths, settings, ends, seed)
        cells.append(trunk)
        for (end, at), share, shape in itertools.product(ends.items(), settings.shares, settings.shapes):
            cells.append(_branch(base, output, lengths, trunk, end, at, share, shape, seed))
        for period in settings.all_periods():
            cells.append(_cosine(base, output, lengths, "cosine", period, seed))
        for period in settings.all_periods():
            if period < 1:
                cells.append(_cosine(base, output, lengths, "cosine_loop", period, seed))
    title = f"WSD against Cosine over {steps:,} steps (sections 4.1 to 4.3 of arXiv 2404.06395)"
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_decays)


def _check_shares(lengths: Lengths, at: int, shares: Sequence[float]) -> None:
    decays = [lengths.decay(at, share) for share in shares]
    # a share that rounds to the steps of another would be run twice under two names
    twice = f"two of them are {max(decays, key=decays.count)} of {at} steps"
    _require(len(set(decays)) == len(decays), "--shares", twice, "lengthen schedule.total")
    _require(
        at - max(decays) >= lengths.warmup_steps,
        "--shares",
        f"a decay of {max(decays)} steps before step {at} begins in the warmup",
        "give smaller --shares, larger --ends or a shorter schedule.warmup",
    )


class Lengths:
    """Shares of a run as whole steps, and as positions in the unit of its schedule.

    Attributes:
        total_steps: S.
        warmup_steps: steps until the full rate.
        interval: steps between evaluations, which meet every one of `ends`.

    Raises:
        UserError: lengths that only evaluations in nearly every step would meet.
    """

    def __init__(self, base: Recipe, total_steps: int, ends: Sequence[float]) -> None:
        self.total_steps, self._plan = total_steps, BatchPlan(base)
        warmup, tokens = base.schedule.warmup, self._plan.tokens(1)
        self.warmup_steps = warmup if self._plan.unit == "steps" else -(-warmup // tokens)
        common = math.gcd(*(round(end * total_steps) for end in ends), total_steps)
        finest = max(1, total_steps // _EVALUATIONS)
        self.interval = max(each for each in range(1, common + 1) if common % each == 0 and each <= finest)
        _require(
            self.interval * _MOST_EVALUATIONS >= total_steps,
            "--ends",
            f"only evaluations every {self.interval} of {total_steps} steps would meet all of them",
            "choose schedule.total so that each is a round number of steps",
        )

    def steps(self, share: float, where: str) -> int:
        """A share of the run as steps, to the nearest whole one.

        Raises:
            UserError: it ends in the warmup.
        """
        found = round(share * self.total_steps)
        _require(found > self.warmup_steps, where, f"{share:g} of {self.total_steps} steps ends in the warmup")
        return found

    def decay(self, end: int, share: float) -> int:
        """Steps of a decay that is a share of `end` steps, one at least."""
        return max(1, round(share * end))

    def position(self, step: int) -> int:
        """Where a run stands after `step` steps, in the schedule's unit."""
        return step if self._plan.unit == "steps" else self._plan.tokens(step)


def _trunk(
    base: Recipe, output: Path, lengths: Lengths, settings: DecaySettings, ends: Mapping[float, int], seed: int
) -> Cell:
    leaves = sorted({at - lengths.decay(at, share) for at in ends.values() for share in settings.shares})
    schedule = _schedule(base, "wsd", lengths.position(leaves[-1]), decay=0)
    overrides = _common(lengths, seed) | {"schedule": schedule, "checkpoint.steps": leaves}
    return make_cell(base, output, f"trunk-s{seed}", overrides, {"role": "trunk", "seed": seed})


def _branch(
    base: Recipe,
    output: Path,
    lengths: Lengths,
    trunk: Cell,
    end: float,
    at: int,
    share: float,
    shape: str,
    seed: int,
) -> Cell:
    first = at - lengths.decay(at, share)
    decay = lengths.position(at) - lengths.position(first)
    half_life = None if shape in SHAPES_WITHOUT_HALF_LIFE else decay / HALF_LIVES
    schedule = _schedule(
        base, "wsd", lengths.position(at), decay=decay, decay_shape=shape, half_life=half_life, min_lr_ratio=None
    )
    labels = {"role": "wsd", "end": end, "end_step": at, "share": share, "shape": shape, "seed": seed}
    name = f"wsd-{end:g}-decay{share:g}-{shape}-s{seed}"
    overrides = _common(lengths, seed) | {"schedule": schedule}
    return make_cell(base, output, name, overrides, labels, trunk=trunk, first_step=first)


def _cosine(base: Recipe, output: Path, lengths: Lengths, shape: str, period: float, seed: int) -> Cell:
    until = max(1, round(period * lengths.position(lengths.total_steps)))
    schedule = _schedule(base, shape, lengths.position(lengths.total_steps), period=until, min_lr_ratio=None)
    labels = {"role": shape, "period": period, "seed": seed}
    overrides = _common(lengths, seed) | {"schedule": schedule}
    return make_cell(base, output, f"{shape.replace('_', '-')}-T{period:g}-s{seed}", overrides, labels)


def _common(lengths: Lengths, seed: int) -> dict[str, Any]:
    return {"training.seed": seed, "evaluation.interval": lengths.interval}


def _schedule(base: Recipe, shape: str, total: int, **more: Any) -> dict[str, Any]:
    fields = {"shape": shape, "unit": base.schedule.unit, "warmup": base.schedule.warmup, "total": total}
    return fields | more


def _different(values: Sequence[float]) -> bool:
    return len(set(values)) == len(values) >= 1 and all(value > 0 and math.isfinite(value) for value in values)


def _require(holds: bool, where: str, what: str, fix: str = "") -> None:
    if not holds:
        raise UserError(what, where=where, fix=fix)
