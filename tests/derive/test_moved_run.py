"""Whose recipe.yaml lies in a folder: a run's, which goes on there, or a user's own."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.derive.moved_run import load_recipe_of_run
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.storage.manifest import MANIFEST, write_manifest
from minicpm_megatron.training.compare import run_recipe
from tests.training import nano

BY_A_RUN: dict[str, Any] = {"recipe": {"name": "mine"}}


def load(folder: Path, saves: dict[int, dict[str, Any] | str]) -> tuple[Recipe, Recipe]:
    """The recipe of a folder as a run's and as a user's; its manifests have these facts, or this text.

    Args:
        saves: step -> facts or text, "" for a folder of that name without a manifest.
    """
    (folder / "checkpoints").mkdir(parents=True)
    for step, content in saves.items():
        checkpoint = folder / "checkpoints" / f"step-{step}"
        checkpoint.mkdir()
        if isinstance(content, dict):
            write_manifest(checkpoint, [], state={"step": step}, facts=content)
        elif content:
            (checkpoint / MANIFEST).write_text(content)
    path = nano.write_recipe(folder, run={"directory": "elsewhere"})
    path.write_text(f"name: mine\n{path.read_text()}")
    return load_recipe_of_run(path), load_recipe(path)


@pytest.mark.parametrize("saves", [{}, {4: ""}, {4: {"model": {}}}], ids=["none", "no manifest", "converted"])
def test_a_recipe_beside_other_checkpoints_is_the_users(saves: dict[int, dict[str, Any] | str], tmp_path: Path) -> None:
    found, plain = load(tmp_path / "work", saves)
    assert found == plain and found.run_directory == Path("elsewhere/mine")


@pytest.mark.parametrize(
    "saves",
    [{4: BY_A_RUN}, {4: BY_A_RUN, 8: ""}, {4: {"model": {}}, 8: BY_A_RUN}, {4: "{damaged"}],
    ids=["saved by a run", "before one without a manifest", "after converted weights", "damaged"],
)
def test_a_recipe_beside_a_runs_checkpoints_is_the_runs(saves: dict[int, dict[str, Any] | str], tmp_path: Path) -> None:
    found, _ = load(tmp_path / "work", saves)
    assert found.run_directory == tmp_path / "work"


def saved_before_bounds(folder: Path, hang_timeout: float) -> Path:
    """The recipe of a run from before hang_timeout had bounds."""
    load(folder, {4: BY_A_RUN})
    path = folder / "recipe.yaml"
    path.write_text(re.sub(r"training:\n", f"training:\n  hang_timeout: {hang_timeout}\n", path.read_text()))
    return path


@pytest.mark.parametrize(("overrides", "kept"), [((), 1e9), (("training.hang_timeout=60",), 60)])
def test_a_run_from_before_hang_timeout_had_bounds_goes_on(
    overrides: Sequence[str], kept: float, tmp_path: Path
) -> None:
    path = saved_before_bounds(tmp_path / "work", 1.0e300)
    found = load_recipe_of_run(path, overrides)
    assert found.training.hang_timeout == kept and found.run_directory == tmp_path / "work"
    assert run_recipe(path.parent).training.hang_timeout == 1e9


def test_what_is_asked_for_now_has_bounds(tmp_path: Path) -> None:
    path = saved_before_bounds(tmp_path / "work", 1.0e300)
    with pytest.raises(UserError, match=r"override 'training.hang_timeout=1.0e300'.*is refused"):
        load_recipe_of_run(path, ["training.hang_timeout=1.0e300"])
    (path.parent / "checkpoints" / "step-4" / MANIFEST).unlink()
    with pytest.raises(UserError, match=r"recipe.yaml:\d+: training.hang_timeout: 1e\+300 is refused"):
        load_recipe_of_run(path)
