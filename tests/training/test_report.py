"""Pictures of a run: its loss, with the trunk that it left, and the load of its experts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.training.expert_picture import draw_experts
from minicpm_megatron.training.metrics import METRICS
from minicpm_megatron.training.report import draw_loss, smooth
from tests.pictures import drawn, legend_of
from tests.training import nano


def write_metrics(run: Path, first: int, last: int, every: int = 5) -> None:
    run.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        lines.append({"kind": "train", "step": step, "loss": 3 + 7 * math.exp(-step / 5), "lr": 0.01})
        if step % every == 0:
            lines.append({"kind": "evaluation", "step": step, "set": "en", "loss_per_token": 3.5})
    (run / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def recipe_of(folder: Path, *overrides: str) -> Recipe:
    return load_recipe(nano.write_recipe(folder), ["name=x", *overrides])


def test_a_smoothed_curve_begins_with_the_first_value_and_is_a_mean_elsewhere() -> None:
    falling = [10 * 0.8**step for step in range(40)]
    curve = smooth(falling)
    assert curve[0] == falling[0] and curve[1] == pytest.approx(sum(falling[:3]) / 3)
    assert curve[20] == pytest.approx(sum(falling[13:28]) / 15)
    assert curve[-1] == pytest.approx(sum(falling[-8:]) / 8)
    assert smooth([1.0, math.nan, 3.0])[1] == 2.0


def test_steps_are_whole_and_the_legend_beside_the_data(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", 82, 85, every=1)
    with drawn() as figures:
        draw_loss(tmp_path / "run", recipe_of(tmp_path), entropy=4.0)
    upper, lower = figures[0].axes
    assert all(float(tick).is_integer() for tick in lower.get_xticks())
    assert "unigram entropy of the data" in legend_of(upper)


def test_a_branch_is_drawn_after_its_trunk(tmp_path: Path) -> None:
    trunk, branch = tmp_path / "trunk", tmp_path / "cool"
    write_metrics(trunk, 1, 60)
    write_metrics(branch, 41, 50)
    save = branch / "checkpoints" / "step-50"
    save.mkdir(parents=True)
    origin = {"run": str(trunk), "step": 40}
    write_manifest(save, [], state={"step": 50, "origin": origin}, facts={})
    with drawn() as figures:
        draw_loss(branch, recipe_of(tmp_path), entropy=4.0)
    upper = figures[0].axes[0]
    lines = {line.get_label(): line for line in upper.get_lines()}
    before = lines["before, in trunk: mean of 15 steps"].get_xdata()
    assert (min(before), max(before)) == (1, 40), "four times as long as the branch, as far as it had come"
    write_metrics(trunk, 1, 1)
    (trunk / METRICS).unlink()
    with drawn() as figures:
        draw_loss(branch, recipe_of(tmp_path), entropy=4.0)
    assert not [name for name in legend_of(figures[0].axes[0]) if "before" in name], "a trunk that is gone"


@pytest.mark.parametrize(("measured", "panels"), [(1, 1), (3, 2)])
def test_no_panel_of_the_experts_is_empty(measured: int, panels: int, tmp_path: Path) -> None:
    layers = [{"layer": layer, "share": [0.6, 0.4], "evenness": 0.97} for layer in (1, 2)]
    lines = [{"kind": "experts", "step": 10 * number, "layers": layers} for number in range(1, measured + 1)]
    (tmp_path / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    with drawn() as figures:
        draw_experts(tmp_path)
    shown = [axis for axis in figures[0].axes if axis.get_label() != "<colorbar>"]
    assert len(shown) == panels
    assert measured == 1 or all(len(line.get_xdata()) == measured for line in shown[1].get_lines())
