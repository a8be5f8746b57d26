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

from minicpm_megatron.errors import require
from minicpm_megatron.recipe import BatchPlan, Recipe
from minicpm_megatron.windtunnel.branching import Timeline, make_branch, make_trunk
from minicpm_megatron.windtunnel.cells import Cell, make_cell
from minicpm_megatron.windtunnel.decays.findings import evaluate_decays
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.settings import are_different_and_positive, check_different

KIND = "wsd"
SHARES = (0.025, 0.05, 0.1, 0.2)  # section 4.3 names the first and the third
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
        require(
            are_different_and_positive(self.ends) and max(self.ends) == 1,
            "--ends",
            "not different shares of which 1 is largest",
        )
        require(
            are_different_and_positive(self.shares) and max(self.shares) < 1, "--shares", "not different shares below 1"
        )
        require(len(set(self.shapes)) == len(self.shapes), "--shapes", "not different shapes")
        require(are_different_and_positive(self.periods), "--periods", "not different positive shares")
        check_different("--seeds", self.seeds, "seeds")

    def all_periods(self) -> tuple[float, ...]:
        """T of every cosine, rising."""
        return tuple(sorted({*self.periods, *self.ends}))


def plan_decays(base: Recipe, settings: DecaySettings, output: Path) -> Experiment:
    """Trunks, branches and cosines.

    Raises:
        UserError: a share that is not a step, a decay that would begin in the warmup, an unknown shape, or a batch
            that grows.
    """
    steps = BatchPlan(base).total_steps()
    lengths = Lengths(base, steps, settings.ends)
    ends = {end: lengths.steps(end, "--ends") for end in settings.ends}
    for at in ends.values():
        _check_shares(lengths, at, settings.shares)
    cells: list[Cell] = []
    for seed in settings.seeds:
        trunk = _trunk(output, lengths, settings, ends, seed)
        cells.append(trunk)
        for (end, at), share, shape in itertools.product(ends.items(), settings.shares, settings.shapes):
            cells.append(_branch(output, lengths, trunk, end, at, share, shape, seed))
        for period in settings.all_periods():
            cells.append(_cosine(output, lengths, "cosine", period, seed))
        for period in settings.all_periods():
            if period < 1:
                cells.append(_cosine(output, lengths, "cosine_loop", period, seed))
    title = f"WSD against Cosine over {steps:,} steps (sections 4.1 to 4.3 of arXiv 2404.06395)"
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_decays)


def _check_shares(lengths: Lengths, at: int, shares: Sequence[float]) -> None:
    decays = [lengths.decay(at, share) for share in shares]
    # a share that rounds to the steps of another would be run twice under two names
    twice = f"two of them are {max(decays, key=decays.count)} of {at} steps"
    require(len(set(decays)) == len(decays), "--shares", twice, "lengthen schedule.total")
    require(
        at - max(decays) >= lengths.warmup_steps,
        "--shares",
        f"a decay of {max(decays)} steps before step {at} begins in the warmup",
        "give smaller --shares, larger --ends or a shorter schedule.warmup",
    )


class Lengths(Timeline):
    """Shares of a run as whole steps.

    Attributes:
        total_steps: S.
        interval: steps between evaluations, which meet every one of `ends`.

    Raises:
        UserError: the batch grows, or lengths that only evaluations in nearly every step would meet.
    """

    def __init__(self, base: Recipe, total_steps: int, ends: Sequence[float]) -> None:
        super().__init__(base)
        self.total_steps = total_steps
        common = math.gcd(*(round(end * total_steps) for end in ends), total_steps)
        finest = max(1, total_steps // _EVALUATIONS)
        self.interval = max(each for each in range(1, common + 1) if common % each == 0 and each <= finest)
        require(
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
        require(found > self.warmup_steps, where, f"{share:g} of {self.total_steps} steps ends in the warmup")
        return found


def _trunk(output: Path, lengths: Lengths, settings: DecaySettings, ends: Mapping[float, int], seed: int) -> Cell:
    leaves = [at - lengths.decay(at, share) for at in ends.values() for share in settings.shares]
    labels = {"role": "trunk", "seed": seed}
    return make_trunk(lengths, output, f"trunk-s{seed}", leaves, _common(lengths, seed), labels)


def _branch(
    output: Path,
    lengths: Lengths,
    trunk: Cell,
    end: float,
    at: int,
    share: float,
    shape: str,
    seed: int,
) -> Cell:
    labels = {"role": "wsd", "end": end, "end_step": at, "share": share, "shape": shape, "seed": seed}
    name = f"wsd-{end:g}-decay{share:g}-{shape}-s{seed}"
    return make_branch(lengths, output, name, trunk, at, share, shape, _common(lengths, seed), labels)


def _cosine(output: Path, lengths: Lengths, shape: str, period: float, seed: int) -> Cell:
    until = max(1, round(period * lengths.position(lengths.total_steps)))
    schedule = lengths.schedule(shape, lengths.position(lengths.total_steps), period=until, min_lr_ratio=None)
    labels = {"role": shape, "period": period, "seed": seed}
    overrides = _common(lengths, seed) | {"schedule": schedule}
    return make_cell(lengths.base, output, f"{shape.replace('_', '-')}-T{period:g}-s{seed}", overrides, labels)


def _common(lengths: Lengths, seed: int) -> dict[str, Any]:
    return {"training.seed": seed, "evaluation.interval": lengths.interval}
