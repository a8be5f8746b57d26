"""What every registered decay shape and every registered schedule keeps, ours and other packages'."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.decay_shapes import decay_settings
from minicpm_megatron.methods.schedule import Schedule, branch_schedule, build_schedule
from minicpm_megatron.methods.torch_schedulers import ScheduleLR
from minicpm_megatron.recipe import Recipe, build, dump_recipe
from minicpm_megatron.registry import DECAY_SHAPES, SCHEDULES
from tests.recipe.fields import minimal_fields

BATCH = 8 * 64  # tokens of a step of `minimal_fields`
OPTIONAL: dict[str, Any] = {"decay": 200, "period": 300, "min_lr_ratio": 0.2, "half_life": 40}
"""A value of every key that not every schedule uses."""


def check_decay_shape(name: str) -> None:
    """A registered shape decays, its own floor is where it ends, and it takes a half-life if and only if it says so."""
    shape = DECAY_SHAPES.get(name)
    half_life = 8 if shape.uses_half_life else None
    settings = decay_settings(name, length=400, half_life=half_life)
    assert settings.min_lr_ratio == shape.default_floor
    values = [shape(step / 400, settings) for step in range(1, 401)]
    assert shape(1e-12, settings) == pytest.approx(1.0, abs=1e-5)
    assert all(later <= earlier for earlier, later in itertools.pairwise([1.0, *values]))
    assert values[-1] == pytest.approx(shape.default_floor, abs=1e-12)
    with pytest.raises(UserError, match="schedule.half_life"):
        decay_settings(name, length=400, half_life=None if shape.uses_half_life else 8)


def recipe_of(name: str, **changes: Any) -> Recipe:
    """A recipe of 1,000 steps with 100 of warmup under the schedule `name`, in tokens."""
    fields: dict[str, Any] = {"shape": name, "unit": "tokens", "warmup": 100 * BATCH, "total": 1000 * BATCH}
    uses = SCHEDULES.get(name).uses
    if "decay" in uses:
        fields |= {"decay": 200 * BATCH, "decay_shape": "linear"}
    return build(minimal_fields(schedule=fields | changes))


def check_schedule(name: str, **changes: Any) -> None:
    """A registered schedule from its recipe to the learning rates that an optimizer uses.

    Args:
        changes: keys of the schedule section that it cannot do without.
    """
    recipe = recipe_of(name, **changes)
    schedule = build_schedule(recipe)
    _check_curve(schedule)
    _check_words(schedule)
    _check_recipe(name, recipe, changes)
    _check_branches(schedule)
    _check_torch(schedule)


def _check_curve(schedule: Schedule) -> None:
    positions = [step * BATCH for step in range(1, 1011)]
    factors = [schedule.factor(position) for position in positions]
    assert all(math.isfinite(factor) and 0 <= factor <= 1 for factor in factors)
    assert 0 < schedule.peak <= 1
    assert factors[:99] == pytest.approx([schedule.peak * step / 100 for step in range(1, 100)], rel=1e-12)
    assert set(factors[999:]) == {schedule.end_factor}


def _check_words(schedule: Schedule) -> None:
    line = schedule.describe(0.01)
    assert "\n" not in line and f"which is {0.01 * schedule.end_factor:.3g}" in line
    places = [position for _, position in schedule.landmarks()]
    assert places == sorted(places) and places[0] == schedule.warmup and places[-1] == schedule.total
    assert schedule.decay_start is None or schedule.warmup <= schedule.decay_start < schedule.total


def _check_recipe(name: str, recipe: Recipe, changes: dict[str, Any]) -> None:
    assert build_schedule(build(yaml.safe_load(dump_recipe(recipe)))) == build_schedule(recipe)
    for key in OPTIONAL.keys() - SCHEDULES.get(name).uses:
        with pytest.raises(UserError, match=f"schedule.{key}: .* no use for it; set schedule.{key}=null"):
            recipe_of(name, **changes, **{key: OPTIONAL[key]})
    options = recipe.schedule.options
    with pytest.raises(UserError, match=r"unknown key schedule.options.xyzzy; (known here are|leave it out)"):
        recipe_of(name, **changes | {"options": options | {"xyzzy": 1}})
    for key in options:
        with pytest.raises(
            UserError, match=rf"unknown key schedule.options.{key}q; did you mean schedule.options.{key}\?"
        ):
            recipe_of(name, **changes | {"options": {f"{key}q": options[key]}})
    assert set(SCHEDULES.get(name).options.lengths) <= set(options)


def _check_branches(schedule: Schedule) -> None:
    stage, settings = schedule.stable_stage, {"decay_shape": "linear", "min_lr_ratio": 0.0}
    if stage is None:
        with pytest.raises(UserError, match="has no stable stage to leave"):
            branch_schedule(schedule, at=500 * BATCH, decay=BATCH, **settings)
        return
    for at in stage:
        branch = branch_schedule(schedule, at=at, decay=50 * BATCH, **settings)
        assert (branch.total, branch.unit, branch.decay_start) == (at + 50 * BATCH, schedule.unit, at)
        before = range(BATCH, int(at) + 1, BATCH)
        assert [branch.factor(position) for position in before] == [schedule.factor(position) for position in before]
        decay = [branch.factor(at + step * BATCH) for step in range(1, 51)]
        assert decay == pytest.approx([schedule.factor(at) * (1 - step / 50) for step in range(1, 51)], abs=1e-12)
        with pytest.raises(UserError, match="is not in the trunk's stable stage"):
            branch_schedule(schedule, at=stage[1] + BATCH, decay=BATCH, **settings)


def _check_torch(schedule: Schedule) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = ScheduleLR(optimizer, replace(schedule), tokens_per_step=BATCH)
    for step in range(1, 1001):
        assert optimizer.param_groups[0]["lr"] == 0.5 * schedule.factor(step * BATCH)
        optimizer.step()
        scheduler.step()
