"""Weights & Biases: curves in RUN/wandb, offline unless WANDB_MODE says otherwise; `wandb sync` sends them later.

A run has one id, which its checkpoints keep, so that what a resumed run writes belongs to the same curves. The x axis
is "step": steps that were undone or lost with a kill are drawn again where they are done again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.observer import RunInfo, ServiceObserver, optional_package


class WandB(ServiceObserver):
    """Needs the package wandb."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__(recipe)
        self._curves: Any = None

    def on_start(self, run: RunInfo) -> None:
        """Begin a run of W&B, or go on with the one that the checkpoint names."""
        super().on_start(run)
        wandb = optional_package("wandb")
        self._curves = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "minicpm_megatron"),
            name=run.recipe.name,
            id=self.id,
            resume=None if self.id is None else "allow",
            dir=str(run.folder),
            config=run.recipe.model_dump(mode="json"),
            # a run opens no connection that nobody asked for
            mode=os.environ.get("WANDB_MODE", "offline"),
            settings=wandb.Settings(console="off", silent=True),
        )
        self.id = self._curves.id
        self._curves.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log the numbers of a step."""
        self._curves.log({"step": step, **values})

    def on_end(self) -> None:
        """Bring the run of W&B to its end."""
        if self._curves is not None:
            self._curves.finish()


OBSERVER = WandB
