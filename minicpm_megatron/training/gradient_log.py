"""Which steps' gradients are compared with the next, and where that is told (logging.gradient_statistics)."""

from __future__ import annotations

from minicpm_megatron.engine.gradient_statistics import ConsecutiveGradients
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.recipe import GradientStatisticsRecipe
from minicpm_megatron.training.metrics import MetricsLog


class GradientLog:
    """The statistics of section 4.4 of the steps that the recipe asks for; all ranks call it alike.

    Of a step they are known when the next one has its gradient, so the last step of a start has none.
    """

    def __init__(self, settings: GradientStatisticsRecipe, state: EngineState) -> None:
        self._settings, self._gradients = settings, ConsecutiveGradients(state)

    def before_update(self, step: int, log: MetricsLog) -> None:
        """Tell of step - 1 if it was kept, and keep `step`, counted from 1, if it is to be measured."""
        if self._settings.interval is None:
            return
        found = self._gradients.compare()
        if found is not None and found.finite:
            log.gradients(step - 1, found)
        if self._wants(step):
            self._gradients.keep()
        else:
            self._gradients.forget()

    def forget(self) -> None:
        """The update of the step that was kept is not made."""
        self._gradients.forget()

    def _wants(self, step: int) -> bool:
        asked = self._settings
        inside = asked.first_step <= step and (asked.last_step is None or step <= asked.last_step)
        return inside and asked.interval is not None and step % asked.interval == 0
