"""No recipe rots: each parses, fits small and large machines, and prints its dry run."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm_megatron.cli.dry_run import format_dry_run
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.planning import Cluster, find_layouts
from minicpm_megatron.planning.report import overrides
from minicpm_megatron.recipe import PRESETS, BatchPlan, count_parameters, load_recipe

FOLDER = Path(__file__).parents[2] / "examples" / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


# of 16 samples a step, for a few processes on CPUs
SMALL = ("quickstart", "extension")
# the planner knows the peaks of GPUs, which are for bf16
LARGE = [path for path in RECIPES if load_recipe(path).training.precision == "bf16"]


@pytest.mark.parametrize("world_size", [1, 2, 8, 16, 64])
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(path: Path, world_size: int) -> None:
    recipe = load_recipe(path)
    world_size = max(world_size, recipe.parallel.context_parallel_size)
    if path.stem in SMALL and world_size > recipe.training.global_batch_size:
        with pytest.raises(UserError, match="16 samples do not divide over 64 .* give a multiple of 64"):
            format_dry_run(recipe, world_size)
        recipe = load_recipe(path, ["training.global_batch_size=64"])
    report = format_dry_run(recipe, world_size)
    assert f"{count_parameters(recipe.model).non_embedding:,}" in report
    assert f"{build_schedule(recipe.schedule).end_factor:.4g}" in report


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_dry_run_of_the_planners_choice(path: Path) -> None:
    best = find_layouts(load_recipe(path), Cluster.of("h100", 64, 8)).layouts[0]
    recipe = load_recipe(path, overrides(best))
    assert recipe.check_world_size(64) == best.layout
    format_dry_run(recipe, 64)


def test_there_is_one_for_every_wind_tunnel_size() -> None:
    names = {path.stem for path in RECIPES}
    assert {name for name in PRESETS if name.startswith("windtunnel-")} <= names
    assert {"quickstart", "minicpm-1.2b", "minicpm-2.4b"} <= names


@pytest.mark.parametrize("path", [path for path in RECIPES if path.stem.startswith("windtunnel")], ids=lambda p: p.stem)
def test_wind_tunnel_is_wsd_of_40n_and_4n(path: Path) -> None:
    recipe = load_recipe(path)
    parameters = count_parameters(recipe.model).non_embedding
    # Table 8 rounds 9.4 million to 9, 5 % away
    assert recipe.schedule.total - recipe.schedule.decay == pytest.approx(40 * parameters, rel=0.05)
    assert recipe.schedule.decay * 11 == recipe.schedule.total


def test_2_4b_is_section_6() -> None:
    recipe = load_recipe(FOLDER / "minicpm-2.4b.yaml")
    plan = BatchPlan(recipe)
    assert plan.tokens(1) == pytest.approx(3.93e6, rel=1e-3)
    assert recipe.schedule.half_life * plan.tokens(1) == pytest.approx(20e9, rel=0.02)
    assert plan.tokens(plan.total_steps()) == pytest.approx(1.1e12, rel=1e-3)
    assert (recipe.optimizer.lr, recipe.schedule.decay_shape) == (0.01, "exponential")


def test_1_2b_grows_from_2_to_4_million_tokens_on_a_curve_in_tokens() -> None:
    recipe = load_recipe(FOLDER / "minicpm-1.2b.yaml")
    plan = BatchPlan(recipe)
    batches = [phase.global_batch_size * plan.sequence_length for phase in plan.phases]
    # Table 2 has one digit: 2M and 4M are 2^21 and 2^22, which is 4.9 % more
    assert batches == pytest.approx([2e6, 4e6], rel=0.05)
    assert recipe.schedule.unit == "tokens"


def test_the_mixture_of_experts_is_section_7_3() -> None:
    recipe = load_recipe(FOLDER / "minicpm-moe-8x2b.yaml")
    plan = BatchPlan(recipe)
    assert plan.tokens(1) == pytest.approx(4e6, rel=0.02)
    assert plan.total_steps() == 130_000
    assert recipe.model == PRESETS["minicpm-moe-8x2b"] and recipe.schedule.shape == "wsd"
    assert (recipe.model.num_moe_experts, recipe.model.moe_router_topk, recipe.model.moe_aux_loss_coeff) == (8, 2, 0.01)
    assert recipe.check_world_size(8).data_parallel_size == 8
