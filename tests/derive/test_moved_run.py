"""Whose recipe.yaml lies in a folder: a run's, which goes on there, or a user's own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.derive.moved_run import load_recipe_of_run
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.storage.manifest import MANIFEST, write_manifest
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
