"""metrics.jsonl: a line for every step ("train"), evaluation, checkpoint and measurement, for programs to read.

After a resume the lines of steps that will be done again are dropped first, so that each step stands once. What undid
them stands in a line of its own ("event"). `training.metrics` reads the file.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.metrics import METRICS, truncate_after
from minicpm_megatron.training.observer import Evaluation, Measurement, Observer, RunInfo, StepRecord


class MetricsJsonl(Observer):
    """Writes metrics.jsonl into the run's folder.

    A run must not lose numbers that nobody can make again without training again, so it stops where they cannot be
    written.
    """

    essential = True

    def __init__(self, recipe: Recipe) -> None:
        self._file: TextIO | None = None

    def on_start(self, run: RunInfo) -> None:
        """Drop the lines of steps that will be done again, and open the file at its end."""
        self._run, self._path = run, run.folder / METRICS
        self._open(run.start, evaluate_again=run.evaluation_due)

    def on_step(self, record: StepRecord) -> None:
        """Write a "train" line."""
        skipped = {"skipped": True, "cause": record.skipped} if record.skipped else {}
        values = self._run.step_values(record)
        self._write("train", record.step, {"tokens": record.tokens, "seconds": record.seconds, **values, **skipped})

    def on_measurement(self, found: Measurement) -> None:
        """Write a line of the measurement's own kind."""
        self._write(found.kind, found.step, found.line)

    def on_evaluation(self, found: Evaluation) -> None:
        """Write an "evaluation" line a set."""
        for name, values in found.losses.items():
            self._write("evaluation", found.step, {"set": name, "tokens": found.tokens, **values})

    def on_save(self, step: int, stall_seconds: float) -> None:
        """Write a "checkpoint" line."""
        self._write("checkpoint", step, {"stall_seconds": stall_seconds})

    def on_rewind(self, step: int, said: str) -> None:
        """Drop the lines of the steps after `step`, and write an "event" line."""
        self._close()
        self._open(step)
        self._write("event", step, {"event": said})

    def on_end(self) -> None:
        """Bring the file to the disk."""
        self._close()

    def _open(self, step: int, *, evaluate_again: bool = False) -> None:
        with self._refusing():
            truncate_after(self._path, step, evaluate_again=evaluate_again)
            self._file = open(self._path, "a", encoding="utf-8")

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with self._refusing():
                file.flush()
                os.fsync(file.fileno())
                file.close()

    def _write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        assert self._file is not None
        with self._refusing():
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()

    @contextlib.contextmanager
    def _refusing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    """The line with which a run ends that cannot write its metrics."""
    return UserError(
        f"cannot write metrics: {error.strerror}",
        where=str(path),
        fix="free some space and start again; the run goes on from its newest checkpoint",
    )


OBSERVER = MetricsJsonl
