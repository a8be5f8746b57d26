"""Hugging Face copy at every save: RUN/huggingface/step-N beside RUN/checkpoints/step-N, whole or not there at all.

A dense model is written as Llama and a mixture of experts as Mixtral, which every program loads, in the precision that
the recipe trains in. A copy stays as long as its checkpoint does. Training waits while rank 0 writes it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from minicpm_megatron.checkpoint.names import DELETING, published_steps, step_folder
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.storage.atomic import PARTIAL_SUFFIX
from minicpm_megatron.training.observer import Observer, RunInfo

COPIES = "huggingface"


class HuggingFaceCopy(Observer):
    """Exports each checkpoint once it is published."""

    def __init__(self, recipe: Recipe) -> None:
        self._format = "llama" if recipe.model.num_moe_experts is None else "mixtral"
        self._dtype = recipe.training.precision

    def on_start(self, run: RunInfo) -> None:
        """Remove what a kill has left of a copy, and copies of steps that will be done again."""
        self._folder = run.folder / COPIES
        for path in self._folder.glob("step-*"):
            if path.suffix in (PARTIAL_SUFFIX, DELETING):
                shutil.rmtree(path)
        self._remove(step for step in published_steps(self._folder) if step > run.start)

    def on_checkpoint(self, folder: Path) -> None:
        """Write the copy, where there is none, and remove those whose checkpoint is gone."""
        from minicpm_megatron.convert.operation import convert

        target = self._folder / folder.name
        if not target.exists():
            convert(folder, target, self._format, dtype=self._dtype)
            print(f"Hugging Face copy of {folder}: {target}", flush=True)
        kept = published_steps(folder.parent)
        self._remove(step for step in published_steps(self._folder) if step not in kept)

    def on_rewind(self, step: int, said: str) -> None:
        """Remove copies of the steps that were undone."""
        self._remove(done for done in published_steps(self._folder) if done > step)

    def _remove(self, steps: Iterable[int]) -> None:
        for step in steps:
            copy = step_folder(self._folder, step)
            doomed = copy.with_name(copy.name + DELETING)
            os.rename(copy, doomed)  # first, so that what has a copy's name is whole
            shutil.rmtree(doomed)


OBSERVER = HuggingFaceCopy
