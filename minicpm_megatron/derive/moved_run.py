"""The recipe of a run that was moved or copied to another place, or is started from another directory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe, build, load_recipe
from minicpm_megatron.recipe.dump import RECIPE
from minicpm_megatron.recipe.moved import moved_path


def load_recipe_of_run(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """`load_recipe`, of RUN/recipe.yaml so that RUN is the folder that the file is in.

    A run writes its recipe with the paths that it was started with. Where RUN has checkpoints and is no longer at that
    place, the run goes on where it is now, unless an override names another one (`name`, `run.directory`); and what
    the recipe names inside the old place and is no longer there is read from inside the new one. Whether that is the
    same data and the same tokenizer, their checksums decide.

    Raises:
        UserError: as `load_recipe`.
    """
    here = path.resolve().parent
    if path.name != RECIPE or not _has_run(here):
        return load_recipe(path, overrides)
    recipe = load_recipe(path, overrides, saved=True)
    before = load_recipe(path, saved=True).run_directory
    if before.resolve() == here:
        return recipe
    fields = recipe.model_dump(mode="json")
    if recipe.run_directory == before:
        fields["name"], fields["run"]["directory"] = here.name, str(here.parent)
    move_paths(fields, before, here)
    return build(fields, origins={"": str(path)})


def _has_run(folder: Path) -> bool:
    """Return whether a run saved the newest checkpoint in a folder.

    A user may keep a recipe.yaml of their own beside any folder named checkpoints, or beside converted weights. A run
    that was taken to be at that place would overwrite it.
    """
    # seconds, with torch
    from minicpm_megatron.checkpoint.find import CHECKPOINTS
    from minicpm_megatron.checkpoint.names import published_steps, step_folder
    from minicpm_megatron.storage.manifest import MANIFEST, read_manifest

    checkpoints = folder / CHECKPOINTS
    saved = [step_folder(checkpoints, step) for step in published_steps(checkpoints)]
    saved = [checkpoint for checkpoint in saved if (checkpoint / MANIFEST).is_file()]
    if not saved:
        return False
    try:
        return "recipe" in read_manifest(saved[-1])
    except UserError:  # for the verification at the start to name and set aside
        return True


def move_paths(fields: dict[str, Any], before: Path, here: Path) -> dict[str, str]:
    """Let a recipe's plain values name files inside `here` where they name such inside `before` that are not there.

    Args:
        before, here: where a run was and is.

    Returns:
        Old prefix -> new prefix of the corpora that were found elsewhere.
    """
    data, moved = fields["data"], {}
    for section, key, suffix in [
        *((source, "prefix", ".idx") for source in data["train"]),
        *((data["validation"], name, ".idx") for name in data["validation"]),
        (data, "tokenizer", ""),
        (fields["deepspeed"], "config", ""),
    ]:
        recorded = section[key]
        if recorded is None or Path(f"{recorded}{suffix}").exists():
            continue
        found = moved_path(Path(recorded), before, here)
        if found is not None:
            section[key] = moved[recorded] = str(found)
    return moved
