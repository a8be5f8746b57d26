"""One trunk at the full rate and decays that leave it: the runs behind `wsd` and `scaling-law` (section 4.2).

A model that ends decayed after E steps leaves the trunk a share of E before, so that a longer decay is not a longer
training. The trunk is saved at every step that a decay leaves from, and ends with the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import BatchPlan, Recipe
from minicpm_megatron.recipe.checks import SHAPES_WITHOUT_HALF_LIFE
from minicpm_megatron.recipe.flops import run_flops
from minicpm_megatron.windtunnel.cells import Cell, make_cell, trunks_of

HALF_LIVES = 5.0
"""Half-lives in an exponential decay, which ends at 1/32 of the rate: ours, the wind tunnel's own is not published."""


class Timeline:
    """Steps of a recipe whose batch does not grow, as positions in the unit of its schedule.

    Attributes:
        base: the recipe.
        warmup_steps: steps until the full rate.
        tokens_per_step: of every step.

    Raises:
        UserError: the batch grows.
    """

    def __init__(self, base: Recipe) -> None:
        if base.training.batch_growth:
            raise UserError("lengths of decays are shares of equal steps", where="training.batch_growth")
        self.base, self._plan = base, BatchPlan(base)
        self.tokens_per_step = self._plan.tokens(1)
        warmup = base.schedule.warmup
        self.warmup_steps = warmup if self._plan.unit == "steps" else -(-warmup // self.tokens_per_step)

    def decay(self, end: int, share: float) -> int:
        """Steps of a decay that is a share of `end` steps, one at least."""
        return max(1, round(share * end))

    def position(self, step: int) -> int:
        """Where a run stands after `step` steps, in the schedule's unit."""
        return step if self._plan.unit == "steps" else self._plan.tokens(step)

    def schedule(self, shape: str, total: int, **more: Any) -> dict[str, Any]:
        """A mapping for the override "schedule": the recipe's unit and warmup, and `total` in that unit."""
        schedule = self.base.schedule
        return {"shape": shape, "unit": schedule.unit, "warmup": schedule.warmup, "total": total} | more


def make_trunk(
    timeline: Timeline,
    output: Path,
    name: str,
    leaves: Sequence[int],
    overrides: Mapping[str, Any],
    labels: Mapping[str, Any],
) -> Cell:
    """The stable stage, saved at the steps `leaves` and no longer than the last of them.

    Raises:
        UserError: the recipe is not valid.
    """
    steps = sorted(set(leaves))
    schedule = timeline.schedule("wsd", timeline.position(steps[-1]), decay=0)
    more = {"schedule": schedule, "checkpoint.steps": steps}
    return make_cell(timeline.base, output, name, {**overrides, **more}, labels)


def make_branch(
    timeline: Timeline,
    output: Path,
    name: str,
    trunk: Cell,
    end: int,
    share: float,
    shape: str,
    overrides: Mapping[str, Any],
    labels: Mapping[str, Any],
) -> Cell:
    """A decay of a share of `end` steps that ends there.

    Raises:
        UserError: the recipe is not valid.
    """
    first = end - timeline.decay(end, share)
    decay = timeline.position(end) - timeline.position(first)
    half_life = None if shape in SHAPES_WITHOUT_HALF_LIFE else decay / HALF_LIVES
    schedule = timeline.schedule(
        "wsd", timeline.position(end), decay=decay, decay_shape=shape, half_life=half_life, min_lr_ratio=None
    )
    more = {"schedule": schedule}
    return make_cell(timeline.base, output, name, {**overrides, **more}, labels, trunk=trunk, first_step=first)


@dataclass(frozen=True)
class SharedCosts:
    """What trunks and branches cost, and what runs of their own would that end as the branches do.

    Attributes:
        tokens, flops: trained.
        separate_tokens, separate_flops: of separate runs.
    """

    tokens: int
    flops: float
    separate_tokens: int
    separate_flops: float


def shared_costs(cells: Sequence[Cell]) -> SharedCosts:
    """The costs of the branches among `cells` and of their trunks; other cells are left out."""
    trunks = trunks_of(cells)
    branches = [cell for cell in cells if cell.trunk is not None]
    shared = [*branches, *(cell for cell in cells if cell.name in trunks)]
    return SharedCosts(
        sum(cell.tokens() for cell in shared),
        sum(cell.flops() for cell in shared),
        sum(BatchPlan(cell.recipe).tokens(cell.last_step) for cell in branches),
        sum(run_flops(cell.recipe, 0, cell.last_step) for cell in branches),
    )
