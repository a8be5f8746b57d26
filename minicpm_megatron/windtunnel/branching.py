"""One trunk at the full rate and decays that leave it: the runs behind `wsd`, `scaling-law`, `envelope` (section 4.2).

A model that ends decayed after E steps leaves the trunk a share of E before, so that a longer decay is not a longer
training. The trunk is saved at every step that a decay leaves from, and ends with the last of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.recipe import BatchPlan, Recipe, count_parameters
from minicpm_megatron.recipe.flops import run_flops
from minicpm_megatron.registry import DECAY_SHAPES
from minicpm_megatron.windtunnel.cells import Cell, make_cell, model_of_size, size_name, trunks_of

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
    DECAY_SHAPES.check(shape, where=f"cell {name}: schedule.decay_shape")
    half_life = decay / HALF_LIVES if DECAY_SHAPES.get(shape).uses_half_life else None
    schedule = timeline.schedule(
        "wsd", timeline.position(end), decay=decay, decay_shape=shape, half_life=half_life, min_lr_ratio=None
    )
    more = {"schedule": schedule}
    return make_cell(timeline.base, output, name, {**overrides, **more}, labels, trunk=trunk, first_step=first)


@dataclass(frozen=True)
class Series:
    """Decays of one size at several lengths of training.

    Attributes:
        size: (width, layers).
        tokens_per_parameter: D / N at the end of every decay, rising; N without embeddings.
        decay_share: of the tokens at its end that a decay is.
        shape: of the decays.
        seed: of trunk and decays; None: the recipe's, and no part of the names.
        points: option that names the lengths, for errors.
        trunk_evaluations: of the trunk at most; 1 is at its end.
    """

    size: tuple[int, int]
    tokens_per_parameter: tuple[float, ...]
    decay_share: float
    shape: str
    seed: int | None = None
    points: str = "--points"
    trunk_evaluations: int = 1


def make_series(timeline: Timeline, output: Path, series: Series) -> list[Cell]:
    """The trunk and its decays, which are labelled "trunk" and "decayed".

    Raises:
        UserError: a size that does not divide into heads, points that are the same step, a decay that begins in the
            warmup, or an unknown shape.
    """
    name, seed = size_name(*series.size), "" if series.seed is None else f"-s{series.seed}"
    model = model_of_size(timeline.base, *series.size)
    parameters = count_parameters(make_cell(timeline.base, output, name, model, {}).recipe.model).non_embedding
    ends = [round(length * parameters / timeline.tokens_per_step) for length in series.tokens_per_parameter]
    leaves = [end - timeline.decay(end, series.decay_share) for end in ends]
    fix = "raise --tokens-per-parameter, or make the batch or the warmup smaller"
    what = f"points of {name} (N = {parameters:,}) end at steps {', '.join(map(str, ends))}"
    require(len(set(ends)) == len(ends), series.points, f"{what}, not all different", fix)
    warmup = f"{what}, and the first decay begins in the {timeline.warmup_steps} steps of warmup"
    require(leaves[0] >= max(1, timeline.warmup_steps), "--tokens-per-parameter", warmup, fix)
    labels: dict[str, Any] = {"width": series.size[0], "layers": series.size[1]}
    if series.seed is not None:
        model, labels = model | {"training.seed": series.seed}, labels | {"seed": series.seed}
    overrides = model | {"evaluation.interval": -(-leaves[-1] // series.trunk_evaluations)}
    trunk = make_trunk(timeline, output, f"trunk-{name}{seed}", leaves, overrides, {"role": "trunk", **labels})
    cells = [trunk]
    for length, end in zip(series.tokens_per_parameter, ends, strict=True):
        overrides = model | {"evaluation.interval": end}
        more = {
            "role": "decayed",
            **labels,
            "tokens_per_parameter": length,
            "end_tokens": end * timeline.tokens_per_step,
        }
        branch, share, shape = f"{name}-{length:.4g}N{seed}", series.decay_share, series.shape
        cells.append(make_branch(timeline, output, branch, trunk, end, share, shape, overrides, more))
    return cells


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


def format_savings(costs: SharedCosts) -> str:
    """One line for a plan."""
    return (
        f"trunks and decays: {costs.tokens:,} tokens, {costs.flops:.3g} FLOPs; as separate runs:"
        f" {costs.separate_tokens:,} tokens, {costs.separate_flops:.3g} FLOPs;"
        f" {costs.flops / costs.separate_flops:.0%} of the FLOPs"
    )
