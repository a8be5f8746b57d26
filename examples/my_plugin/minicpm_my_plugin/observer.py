"""An observer is made of the recipe, and overrides the calls that it needs; its state travels in the checkpoints."""

from __future__ import annotations

from typing import Any

from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.observer import Evaluation, Observer


class BestLoss(Observer):
    """Says when a validation loss is the lowest so far, also of the starts before this one."""

    def __init__(self, recipe: Recipe) -> None:
        self._best: dict[str, float] = {}

    def on_evaluation(self, found: Evaluation) -> None:
        """Compare each set's loss with its lowest."""
        for name, losses in found.losses.items():
            loss = losses["loss_per_token"]
            if loss is not None and loss < self._best.get(name, float("inf")):
                self._best[name] = loss
                print(f"best validation loss of {name} so far: {loss:.4f} at step {found.step}", flush=True)

    def state_dict(self) -> dict[str, Any]:
        """The lowest losses."""
        return dict(self._best)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with them."""
        self._best = dict(state)
