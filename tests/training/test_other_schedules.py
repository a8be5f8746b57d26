"""Branches and resumes under the power schedule and WSD-S, as far as a start decides them; test_branch.py runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedule import build_schedule
from minicpm_megatron.recipe import Recipe, build
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.training.start import branch_recipe, check_same_past
from tests.recipe.fields import minimal_fields

BATCH = 512  # tokens of a step
LENGTHS = {"unit": "tokens", "warmup": 4 * BATCH, "total": 16 * BATCH, "decay": 4 * BATCH, "decay_shape": "linear"}
POWER = {"shape": "power", **LENGTHS, "options": {"amplitude": 3.0}}
WSD_S = {"shape": "wsd-s", "warmup": 4, "total": 8, "options": {"decay_share": 0.25}}


def recipe(folder: Path, name: str, schedule: dict[str, Any]) -> Recipe:
    run = {"directory": str(folder)}
    return build(minimal_fields(name=name, run=run, optimizer={"lr": 0.005}, schedule=schedule))


def saved(trunk: Recipe, step: int) -> Recipe:
    """The run, with the manifest of a checkpoint."""
    folder = trunk.run_directory / "checkpoints" / f"step-{step}"
    folder.mkdir(parents=True)
    write_manifest(folder, [], state={"step": step}, facts={"recipe": trunk.model_dump(mode="json")})
    return trunk


def test_a_decay_leaves_a_power_trunk_where_its_checkpoint_stands(tmp_path: Path) -> None:
    trunk = build_schedule(saved(recipe(tmp_path, "trunk", POWER), 10))
    asked = recipe(tmp_path, "branch", POWER | {"decay": 2 * BATCH})
    branch = build_schedule(branch_recipe(asked, "trunk@10")[0])
    past = range(BATCH, 10 * BATCH + 1, BATCH)
    assert branch.total == 12 * BATCH
    assert [branch.factor(position) for position in past] == [trunk.factor(position) for position in past]
    decay = [branch.factor(step * BATCH) / trunk.factor(10 * BATCH) for step in (11, 12)]
    assert decay == pytest.approx([0.55, 0.1], rel=1e-12)


@pytest.mark.parametrize(
    ("trunk", "step", "branch", "line"),
    [
        (POWER, 10, {"shape": "wsd", **LENGTHS}, "schedule: would have given step 10 the rate factor 1 and not 0.96"),
        (POWER, 10, POWER | {"options": {"amplitude": 2.0}}, "schedule: would have given step 5 the rate factor"),
        (POWER, 10, POWER | {"decay": 0}, "a branch needs a decay; give the trunk's shape, wsd for a constant trunk"),
        (POWER, 13, POWER, "step 13 is not in the stable stage"),
        (POWER, 3, POWER, "step 3 is not in the stable stage"),
        (
            WSD_S,
            8,
            {"warmup": 4, "total": 16, "decay": 4, "decay_shape": "linear"},
            "step 8 is not in the stable stage",
        ),
    ],
)
def test_a_branch_that_cannot_be(
    trunk: dict[str, Any], step: int, branch: dict[str, Any], line: str, tmp_path: Path
) -> None:
    saved(recipe(tmp_path, "trunk", trunk), step)
    with pytest.raises(UserError, match=line):
        branch_recipe(recipe(tmp_path, "branch", branch), f"trunk@{step}")


def test_wsd_s_goes_on_where_its_total_becomes_a_budget(tmp_path: Path) -> None:
    finished = recipe(tmp_path, "run", WSD_S)
    options = WSD_S["options"] | {"budgets": [8]}
    check_same_past(finished, recipe(tmp_path, "run", WSD_S | {"total": 12, "options": options}), 8)
    with pytest.raises(UserError, match="schedule: would have given step 7 the rate factor 1 and not 0.18"):
        check_same_past(finished, recipe(tmp_path, "run", WSD_S | {"total": 12}), 8)
