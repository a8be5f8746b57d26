"""Observer: what is called while a run trains, and may change nothing of it.

A member of the registry `OBSERVERS` is a callable that takes the recipe and returns an `Observer`, or None where the
run has no use for it. It is called on every rank before the run begins, so it opens no file and starts no service;
`on_start` does that.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe

if TYPE_CHECKING:
    from torch.nn import Module

    from minicpm_megatron.engine.state import EngineState
    from minicpm_megatron.model.config import MiniCPMConfig


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        tokens: tokens consumed once it is done.
        loss: the objective over the global batch, in nats per token: the mean cross-entropy unless the recipe has
            another one.
        lr: base learning rate x schedule factor (the embedding's and the norms').
        gradient_norm: before clipping; None: not known.
        seconds: wall time of the step.
        step_tokens: tokens of the step.
        sequence_length: tokens of the rows that it was fed as.
        memory_bytes: the most that this rank's device has held.
        skipped: why no update was made; None: it was.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    gradient_norm: float | None
    seconds: float
    step_tokens: int
    sequence_length: int
    memory_bytes: int = 0
    skipped: str | None = None


@dataclass(frozen=True)
class Evaluation:
    """Losses on the validation sets.

    Attributes:
        step, tokens: done and consumed by then.
        losses: name of the set -> {"loss_per_token", "loss_per_byte"} in nats, None: unknown.
    """

    step: int
    tokens: int
    losses: Mapping[str, Mapping[str, float | None]]


@dataclass(frozen=True)
class Measurement:
    """What one observer has measured, for those that write.

    Attributes:
        kind: the kind of line in metrics.jsonl.
        step: number of the step that was measured.
        line: JSON values of that line.
        scalars: the same as numbers by tag, for curves; None: not known.
    """

    kind: str
    step: int
    line: Mapping[str, Any]
    scalars: Mapping[str, float | None] = field(default_factory=dict)


@dataclass(frozen=True)
class RunInfo:
    """What an observer may know of the run when it starts.

    Attributes:
        recipe: what is run.
        folder: the run's folder, which exists.
        rank: of this process.
        start, total: steps done so far, and steps of the whole run.
        evaluation_due: the evaluation at `start` will be made again.
        flops_per_token: FLOPs that a token of rows so long needs.
        peak_flops: FLOP/s of all ranks together.
        tell: passes a measurement on to every observer.
        model, config: this rank's part of the model; None in a test without one.
        engine_state: weights and gradients of this rank; None in a test without an engine.
    """

    recipe: Recipe
    folder: Path
    rank: int
    start: int
    total: int
    evaluation_due: bool
    flops_per_token: Callable[[int], float]
    peak_flops: float
    tell: Callable[[Measurement], None]
    model: Module | None = None
    config: MiniCPMConfig | None = None
    engine_state: EngineState | None = None

    def step_values(self, record: StepRecord) -> dict[str, float | None]:
        """The numbers of a step that curves are drawn of; None where JSON has no number for them."""
        rate = record.step_tokens / record.seconds
        achieved = rate * self.flops_per_token(record.sequence_length)
        return {
            "loss": finite(record.loss),
            "lr": record.lr,
            "gradient_norm": finite(record.gradient_norm),
            "tokens_per_second": rate,
            "model_flops_per_second": achieved,
            "utilisation": achieved / self.peak_flops,
            "memory_bytes": record.memory_bytes,
            "sequence_length": record.sequence_length,
        }


class Observer:
    """The base of all observers, whose calls do nothing.

    Rank 0 alone calls an observer, unless it is `everywhere`. An exception leaves it out of the rest of the run, with
    one line on standard error, and the run goes on.

    Attributes:
        everywhere: every rank calls it alike, so that it may make collectives. Between two of them it must not fail on
            one rank alone: the others would wait in the next. What fails before or after them is agreed on.
        essential: the run must not go on without it: it stops after the step with a checkpoint and exit status 2.
    """

    everywhere: ClassVar[bool] = False
    essential: ClassVar[bool] = False

    def on_start(self, run: RunInfo) -> None:
        """Begin; called after `load_state_dict` where the run goes on from a checkpoint."""

    def before_update(self, step: int) -> None:
        """The gradients of `step`, counted from 1, are there, and no weight has changed yet."""

    def on_step(self, record: StepRecord) -> None:
        """A step is done, or was skipped."""

    def on_measurement(self, found: Measurement) -> None:
        """Another observer has measured something; called on rank 0."""

    def on_evaluation(self, found: Evaluation) -> None:
        """The validation sets were evaluated."""

    def on_save(self, step: int, stall_seconds: float) -> None:
        """A save of `step` has begun, for which training waited so long; with asynchronous saves it goes on."""

    def on_checkpoint(self, folder: Path) -> None:
        """A checkpoint is published. Training waits, training.hang_timeout seconds at most.

        Called again where a run goes on from the checkpoint, since it may have been killed in the first call.
        """

    def on_rewind(self, step: int, said: str) -> None:
        """The steps after `step` were undone, for the reason `said`, and will be done again."""

    def on_end(self) -> None:
        """The run ends, for whatever reason."""

    def state_dict(self) -> dict[str, Any]:
        """JSON values that travel in every checkpoint, from which `load_state_dict` goes on; rank 0's are kept."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take the state over that a checkpoint holds: at the start of a run that goes on, and before `on_rewind`."""


class ScalarObserver(Observer):
    """An observer that draws curves: a subclass has `write` alone to define."""

    def on_start(self, run: RunInfo) -> None:
        """Remember the run, by which a step's speed is known."""
        self.run = run

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Draw numbers by tag, such as "train/loss", at a step."""
        raise NotImplementedError

    def on_step(self, record: StepRecord) -> None:
        """Draw the step's numbers."""
        self._write("train/", record.step, self.run.step_values(record))

    def on_measurement(self, found: Measurement) -> None:
        """Draw what was measured."""
        self._write("", found.step, found.scalars)

    def on_evaluation(self, found: Evaluation) -> None:
        """Draw the losses of every set."""
        for name, losses in found.losses.items():
            self._write(f"evaluation/{name}/", found.step, losses)

    def on_save(self, step: int, stall_seconds: float) -> None:
        """Draw how long training waited."""
        self._write("checkpoint/", step, {"stall_seconds": stall_seconds})

    def _write(self, prefix: str, step: int, values: Mapping[str, float | None]) -> None:
        self.write(step, {f"{prefix}{name}": value for name, value in values.items() if value is not None})


class ServiceObserver(ScalarObserver):
    """An observer that draws curves in a service, whose id for the run the checkpoints keep.

    Attributes:
        id: of the run in the service; None: it has none yet.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.id: str | None = None

    def state_dict(self) -> dict[str, Any]:
        """The run's id."""
        return {} if self.id is None else {"id": self.id}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on with that run."""
        self.id = str(state["id"])


def optional_package(name: str) -> Any:
    """The module of a package that not everybody has.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        raise UserError(f"the package {name} is not installed", fix=f"pip install {name}") from None


def finite(value: float | None) -> float | None:
    """`value`, or None where JSON has no number for it."""
    return value if value is not None and math.isfinite(value) else None


def as_factory(entry: Any) -> Callable[[Recipe], Observer | None]:
    """`entry`, which must be callable with a recipe.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(entry):
        raise TypeError(f"an observer must be a class or a function of the recipe, not {type(entry).__name__}")
    return entry  # type: ignore[no-any-return]
