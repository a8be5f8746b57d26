"""The plans of examples/windtunnel name every experiment, on a recipe that can be read."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm_megatron.recipe import load_recipe, yaml_text

ROOT = Path(__file__).parents[2]
EXPERIMENTS = {"coord-check", "lr", "wsd", "decay-study", "scaling-law", "batch-size", "envelope", "search"}


@pytest.mark.parametrize("name", ["cpu", "smoke"])
def test_a_plan_has_every_experiment_on_a_recipe_that_is_there(name: str) -> None:
    plan = yaml_text.read(ROOT / "examples" / "windtunnel" / f"{name}.yaml", "the plan").value
    assert {str(each.get("command", key)) for key, each in plan["experiments"].items()} == EXPERIMENTS
    recipe = load_recipe(ROOT / plan["recipe"], plan.get("overrides", []))
    assert recipe.data.validation
