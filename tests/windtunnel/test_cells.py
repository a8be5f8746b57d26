"""What cells cost and are made of, against closed forms."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.mup import mup_table, residual_multiplier
from minicpm_megatron.methods.schedule import build_schedule
from minicpm_megatron.windtunnel.cells import STANDARD_INIT_STD, check_names, make_cell, model_of_size, scaled_schedule
from minicpm_megatron.windtunnel.experiment import format_plan
from minicpm_megatron.windtunnel.rates.sweep import RateSettings, plan_rates
from tests.windtunnel.pretended import base

SETTINGS = RateSettings(
    sizes=((32, 2), (64, 5)),
    rates=(0.005, 0.01, 0.02),
    standard_rates=(0.001, 0.002, 0.004),
    parametrizations=("mup", "standard"),
    seeds=(1, 2),
)


def closed_form(width: int, layers: int, vocabulary: int, length: int) -> tuple[int, float]:
    """(N, FLOPs a token): 4 W^2 of attention and 3 x 2.5 W^2 of MLP a layer; 6 (N + V W) + 12 L W s."""
    n = layers * (4 * width**2 + 3 * width * (5 * width // 2) + 2 * width) + width
    return n, 6 * (n + vocabulary * width) + 12 * layers * width * length


def test_the_plan_costs_what_the_closed_form_says(tmp_path: Path) -> None:
    experiment = plan_rates(base(tmp_path), SETTINGS, tmp_path / "out")
    assert len(experiment.cells) == 2 * 2 * 3 * 2
    tokens, flops = 400 * 4 * 32, 0.0
    for cell in experiment.cells:
        n, per_token = closed_form(cell.labels["width"], cell.labels["layers"], 512, 32)
        assert (cell.parameters, cell.tokens(), cell.flops()) == (n, tokens, per_token * tokens)
        flops += cell.flops()
    text = format_plan(experiment, flops_per_second=flops / 3600, workers=2)
    last = text.splitlines()[-2].split()
    assert last == ["24", "cells", f"{24 * tokens:,}", f"{flops:.3g}", "0:30:00"]


def test_a_branch_costs_its_own_steps(tmp_path: Path) -> None:
    recipe = base(tmp_path)
    trunk = make_cell(recipe, tmp_path, "trunk", {"schedule.decay": 0}, {})
    branch = make_cell(recipe, tmp_path, "branch", {}, {}, trunk=trunk, first_step=360)
    assert (branch.tokens(), branch.tokens(370)) == (40 * 128, 10 * 128)
    assert branch.flops() == trunk.flops() / 10
    assert branch.flops(5) == 0  # has not begun
    assert branch.fingerprint != make_cell(recipe, tmp_path, "branch", {}, {}).fingerprint


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_tokens_a_parameter_stretch_the_schedule(tmp_path: Path, unit: str) -> None:
    scale = 1 if unit == "steps" else 128
    lengths = {key: value * scale for key, value in {"warmup": 10, "total": 400, "decay": 40}.items()}
    recipe = base(tmp_path, schedule={"unit": unit, **lengths})
    settings = RateSettings(
        sizes=((32, 2), (64, 5)),
        rates=(1.0, 2.0, 3.0),
        standard_rates=(1.0, 2.0, 3.0),
        parametrizations=("mup",),
        seeds=(1,),
        tokens_per_parameter=10,
    )
    for cell in plan_rates(recipe, settings, tmp_path).cells:
        wanted = 10 * cell.parameters
        assert abs(cell.tokens() - wanted) <= 128
        schedule = cell.recipe.schedule
        assert schedule.decay is not None
        assert schedule.decay / schedule.total == pytest.approx(0.1, rel=0.01)
        assert schedule.warmup / schedule.total == pytest.approx(0.025, rel=0.02)


def test_positions_among_a_schedules_own_keys_are_stretched_with_the_run(tmp_path: Path) -> None:
    schedule = {"shape": "wsd-s", "decay": None, "options": {"budgets": [100, 200], "decay_share": 0.2}}
    recipe = base(tmp_path, schedule=schedule)
    stretched = make_cell(recipe, tmp_path, "x", {"schedule": scaled_schedule(recipe, 800)}, {}).recipe
    assert stretched.schedule.options == {"budgets": [200, 400], "decay_share": 0.2}
    short, long = build_schedule(recipe), build_schedule(stretched)
    assert [long.factor(2 * s) for s in range(1, 401)] == pytest.approx([short.factor(s) for s in range(1, 401)])


def test_standard_parametrisation_has_none_of_table_7(tmp_path: Path) -> None:
    cells = plan_rates(base(tmp_path), SETTINGS, tmp_path).cells
    for cell in cells:
        model = cell.recipe.model
        rules = {role: rule for role, rule in mup_table(model).items() if role != "vector"}
        plain = {(rule.init_std, rule.lr_multiplier) for rule in rules.values()} == {(STANDARD_INIT_STD, 1.0)}
        plain = plain and residual_multiplier(model.scale_depth, model.num_layers) == pytest.approx(1)
        assert (plain and model.scale_emb == 1) == (cell.labels["parametrization"] == "standard")


def test_cells_do_not_depend_on_where_the_experiment_is(tmp_path: Path) -> None:
    prints = [
        [cell.fingerprint for cell in plan_rates(base(tmp_path), SETTINGS, tmp_path / name).cells] for name in "ab"
    ]
    assert prints[0] == prints[1]
    assert len(set(prints[0])) == 24


def test_a_recipe_that_is_not_valid_is_named_with_its_cell(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cell x: schedule.decay"):
        make_cell(base(tmp_path), tmp_path, "x", {"schedule.decay": None}, {})
    with pytest.raises(UserError, match="33 does not divide into heads of 16"):
        model_of_size(base(tmp_path), 33, 2)
    cell = make_cell(base(tmp_path), tmp_path, "x", {}, {})
    with pytest.raises(UserError, match="two cells are called x"):
        check_names([cell, cell])


def test_a_cell_without_intervals_is_evaluated_and_saved(tmp_path: Path) -> None:
    recipe = make_cell(base(tmp_path, training={"stop_after": 3}), tmp_path, "x", {}, {}).recipe
    assert (recipe.evaluation.interval, recipe.checkpoint.interval, recipe.training.stop_after) == (400, 40, None)
    assert re.fullmatch(r".*/cells/x", str(recipe.run_directory))
