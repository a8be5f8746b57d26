"""The tokenizer folder of a checkpoint: the recorded path, or a folder inside a run that was moved or copied."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.convert.tokenizer_folder import FAST, SENTENCEPIECE
from minicpm_megatron.data.tokenizers import has_tokenizer
from minicpm_megatron.recipe.moved import moved_path
from minicpm_megatron.storage.manifest import TOKENIZER_SHA256


def recorded_tokenizer(manifest: dict[str, Any], state: RunState, folder: Path) -> tuple[Path | None, tuple[str, ...]]:
    """The tokenizer folder that a checkpoint's recipe, or the conversion that made it, names, and notes.

    A path inside the run that saved the checkpoint is looked up inside the run that now holds it, too. Where the
    manifest has the tokenizer's checksum, a tokenizer of another one is passed over.

    Args:
        state: the state in the manifest.
        folder: the checkpoint.

    Returns:
        None where no tokenizer is recorded, or only others were found. Where nothing is there the recorded path.
    """
    recorded = _recorded(manifest, state)
    if recorded is None:
        return None, ()
    there = [path for path in _places(recorded, manifest, folder) if path.is_dir()]
    if not there:
        return recorded, ()
    due = manifest.get(TOKENIZER_SHA256)
    for path in there:
        if due is None or has_tokenizer(path, due):
            return path, ()
    return None, (f"{there[0]} has another tokenizer than the run's",)


def _recorded(manifest: dict[str, Any], state: RunState) -> Path | None:
    recipe = manifest.get("recipe")
    data = recipe.get("data") if isinstance(recipe, dict) else None
    named = data.get("tokenizer") if isinstance(data, dict) else None
    text = named if isinstance(named, str) else state.tokenizer
    if text is None:
        return None
    path = Path(text)
    # a recipe may name the file itself
    return path.parent if path.is_file() or path.name in (SENTENCEPIECE, FAST) else path


def _places(recorded: Path, manifest: dict[str, Any], folder: Path) -> Iterator[Path]:
    yield recorded
    folder = folder.resolve()
    run = folder.parent.parent if folder.parent.name == "checkpoints" else folder.parent
    recipe = manifest.get("recipe")
    if isinstance(recipe, dict):  # as a run has written it, with every key
        found = moved_path(recorded, Path(recipe["run"]["directory"]) / recipe["name"], run)
        if found is not None:
            yield found
    yield run / recorded.name
