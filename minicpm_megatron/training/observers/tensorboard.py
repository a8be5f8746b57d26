"""TensorBoard: curves in the run's folder, where logging.tensorboard is on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.observer import RunInfo, ScalarObserver


class TensorBoard(ScalarObserver):
    """Writes event files; curves of steps that will be done again are purged."""

    def on_start(self, run: RunInfo) -> None:
        """Open an event file that begins at the next step."""
        super().on_start(run)
        self._open(run.start)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write each number into its curve."""
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)

    def on_rewind(self, step: int, said: str) -> None:
        """Begin a new event file, which purges what was undone, and note why."""
        self._board.close()
        self._open(step)
        self._board.add_text("event", said, step)

    def on_end(self) -> None:
        """Bring the curves to the disk."""
        self._board.close()

    def _open(self, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # a second to import

        self._board: Any = SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=step + 1)


def tensorboard(recipe: Recipe) -> TensorBoard | None:
    """The observer, or None where the recipe switches it off."""
    return TensorBoard() if recipe.logging.tensorboard else None


OBSERVER = tensorboard
