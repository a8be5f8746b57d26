"""Gradient statistics: consecutive gradients compared, for the steps of logging.gradient_statistics (section 4.4)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicpm_megatron.recipe import GradientStatisticsRecipe, Recipe
from minicpm_megatron.training.metrics import GRADIENTS
from minicpm_megatron.training.observer import Measurement, Observer, RunInfo, StepRecord, finite

if TYPE_CHECKING:
    from minicpm_megatron.engine.gradient_statistics import GradientStatistics


class GradientComparison(Observer):
    """Compares a step's gradient with the next one's; the last step of a start has none."""

    everywhere = True

    def __init__(self, settings: GradientStatisticsRecipe) -> None:
        self._settings = settings

    def on_start(self, run: RunInfo) -> None:
        """Remember where the gradients are."""
        from minicpm_megatron.engine.gradient_statistics import ConsecutiveGradients  # with it comes DeepSpeed

        assert run.engine_state is not None
        self._run, self._gradients = run, ConsecutiveGradients(run.engine_state)

    def before_update(self, step: int) -> None:
        """Say what step - 1 was like if it was kept, and keep `step` if it is to be measured."""
        found = self._gradients.compare()
        if found is not None and found.finite:
            self._run.tell(_measurement(step - 1, found))
        if self._wants(step):
            self._gradients.keep()
        else:
            self._gradients.forget()

    def on_step(self, record: StepRecord) -> None:
        """Forget a step whose update was not made."""
        if record.skipped is not None:
            self._gradients.forget()

    def on_rewind(self, step: int, said: str) -> None:
        """Forget a step that was undone."""
        self._gradients.forget()

    def _wants(self, step: int) -> bool:
        asked = self._settings
        inside = asked.first_step <= step and (asked.last_step is None or step <= asked.last_step)
        return inside and asked.interval is not None and step % asked.interval == 0


def _measurement(step: int, found: GradientStatistics) -> Measurement:
    sums = found.sums
    values = {
        "gradient_norm": sums.gradient_norm,
        "max_gradient": found.max_gradient,
        "gradient_cosine": sums.gradient_cosine,
        "first_derivative": sums.first_derivative,
        "second_derivative": sums.second_derivative,
        "curvature": sums.curvature,
        "update_norm": sums.update_norm,
    }
    line = {name: finite(value) for name, value in values.items()}
    return Measurement(GRADIENTS, step, line, {f"{GRADIENTS}/{name}": value for name, value in line.items()})


def gradient_statistics(recipe: Recipe) -> GradientComparison | None:
    """The observer, or None where the recipe measures no step."""
    settings = recipe.logging.gradient_statistics
    return None if settings.interval is None else GradientComparison(settings)


OBSERVER = gradient_statistics
