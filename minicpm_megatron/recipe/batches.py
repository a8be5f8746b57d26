"""Steps, samples and tokens of a run as pure functions of the recipe, also when the batch grows in mid-run."""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class BatchPhase:
    """A stretch of steps with one batch size.

    Attributes:
        first_step: steps done when it begins.
        first_sample: samples consumed when it begins.
        global_batch_size: samples a step.
    """

    first_step: int
    first_sample: int
    global_batch_size: int


class BatchPlan:
    """Where each step of a run stands.

    The batch grows with the first step that begins at or after `batch_growth.after_tokens`, so a phase always ends
    with a whole step. `step` counts finished steps throughout: step 0 is the start, and the update that takes the
    run from step k to k + 1 reads samples [samples(k), samples(k + 1)).
    """

    def __init__(self, recipe: Recipe) -> None:
        self.sequence_length = recipe.data.sequence_length
        self.curriculum = recipe.data.curriculum
        self.unit, self.total = recipe.schedule.unit, recipe.schedule.total
        self.stop_after = recipe.training.stop_after
        phases = [BatchPhase(0, 0, recipe.training.global_batch_size)]
        for growth in recipe.training.batch_growth:
            last = phases[-1]
            missing = growth.after_tokens - last.first_sample * self.sequence_length
            steps = max(0, -(-missing // (last.global_batch_size * self.sequence_length)))
            start = BatchPhase(
                last.first_step + steps, last.first_sample + steps * last.global_batch_size, growth.global_batch_size
            )
            # two growths inside one step: the later wins and no phase is empty
            phases = [*(phases if steps else phases[:-1]), start]
        self.phases = tuple(phases)

    def _phase(self, step: int) -> BatchPhase:
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def global_batch_size(self, step: int) -> int:
        """Samples of the update that begins when `step` steps are done."""
        return self._phase(step).global_batch_size

    def samples(self, step: int) -> int:
        """Samples consumed once `step` steps are done."""
        phase = self._phase(step)
        return phase.first_sample + (step - phase.first_step) * phase.global_batch_size

    def tokens(self, step: int) -> int:
        """Tokens consumed once `step` steps are done."""
        return self.samples(step) * self.sequence_length

    def position(self, step: int) -> int:
        """Position in the schedule's unit of the update that begins when `step` steps are done.

        An update stands where it ends (`methods.schedules`): in steps at step + 1, in tokens at tokens(step + 1).
        """
        return step + 1 if self.unit == "steps" else self.tokens(step + 1)

    def row_length(self, step: int) -> int:
        """Tokens of the rows that a sample is fed as in the update that begins when `step` steps are done."""
        done = step if self.unit == "steps" else self.tokens(step)
        return next((part.sequence_length for part in self.curriculum if done < part.until), self.sequence_length)

    def last_step(self) -> int:
        """Steps of the run: those of the schedule, or training.stop_after where that is earlier."""
        return min(self.total_steps(), self.stop_after or self.total_steps())

    def total_steps(self) -> int:
        """Steps until the schedule's total is reached; in tokens the last step may go beyond it."""
        if self.unit == "steps":
            return self.total
        for phase in reversed(self.phases):
            missing = self.total - phase.first_sample * self.sequence_length
            if missing > 0:
                return phase.first_step - (-missing // (phase.global_batch_size * self.sequence_length))
        raise AssertionError("the first phase begins at token 0, and the total is positive")
