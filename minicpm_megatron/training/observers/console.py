"""Console: one readable line every logging.interval steps, and one for each thing that happens to the run."""

from __future__ import annotations

import math

from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.metrics import duration, human
from minicpm_megatron.training.observer import Evaluation, Observer, RunInfo, StepRecord


class Console(Observer):
    """Prints on standard output; rates are means over the steps since the last line."""

    def __init__(self, recipe: Recipe) -> None:
        self._interval = recipe.logging.interval
        self._tokens = self._seconds = 0.0
        self._steps = 0

    def on_start(self, run: RunInfo) -> None:
        """Remember where the run stands."""
        self._run, self._start = run, run.start

    def on_step(self, record: StepRecord) -> None:
        """Print the step's line where one is due, or why the step was skipped."""
        self._tokens += record.step_tokens
        self._seconds += record.seconds
        self._steps += 1
        if record.skipped:
            _say(f"skipped: {record.skipped}")
        elif record.step % self._interval == 0 or record.step in (self._start + 1, self._run.total):
            _say(self._line(record))
            self._tokens = self._seconds = 0.0
            self._steps = 0

    def on_evaluation(self, found: Evaluation) -> None:
        """Print the losses of all sets in one line."""
        parts = [
            f"{name} {values['loss_per_token']:.4f}"
            + ("" if values["loss_per_byte"] is None else f" ({values['loss_per_byte']:.4f}/byte)")
            for name, values in found.losses.items()
        ]
        if parts:
            _say(f"evaluation at step {found.step}, nats per token: " + ", ".join(parts))

    def on_rewind(self, step: int, said: str) -> None:
        """Print why steps were undone; the first that is done again has a line."""
        self._start = step
        _say(said)

    def _line(self, record: StepRecord) -> str:
        total = self._run.total
        norm = math.nan if record.gradient_norm is None else record.gradient_norm
        rate = self._tokens / self._seconds
        achieved = rate * self._run.flops_per_token(record.sequence_length)
        left = (total - record.step) * self._seconds / self._steps
        return (
            f"step {record.step:>{len(str(total))}}/{total} | loss {record.loss:.4f} | lr {record.lr:.2e} | "
            f"grad {norm:.3f} | {human(record.tokens)} tokens | {rate:,.0f} tokens/s | "
            f"{human(achieved)}FLOP/s ({achieved / self._run.peak_flops:.0%}) | "
            f"{record.memory_bytes / 2**30:.2f} GiB | ETA {duration(left)}"
        )


def _say(text: str) -> None:
    print(text, flush=True)


OBSERVER = Console
