"""One step: forward and backward, the ranks' exchange, and the update or the answer to a fault."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

from minicpm_megatron.engine.engine import MicroBatch
from minicpm_megatron.parallel import device
from minicpm_megatron.training import guards
from minicpm_megatron.training.fault_answers import go_back, stop_before_update
from minicpm_megatron.training.faults import GRADIENT_NORM, LOSS, Fault
from minicpm_megatron.training.objective import Offers
from minicpm_megatron.training.observer import StepRecord
from minicpm_megatron.training.run import Run
from minicpm_megatron.training.saving import Saves


class Reader(Offers, Protocol):
    """The training data of a rank; `training.batches.BatchReader` is one."""

    def micro_batches(
        self, first_sample: int, global_batch_size: int, row_length: int | None = None
    ) -> Iterator[MicroBatch]:
        """This rank's micro-batches of the samples [first_sample, first_sample + global_batch_size)."""


@dataclass(frozen=True)
class Batch:
    """The global batch of a step.

    Attributes:
        first, samples: position of its first sample in the data, and how many there are.
        length: tokens of the rows that they are fed as.
    """

    first: int
    samples: int
    length: int


class Stepper:
    """Makes the steps of a run.

    Args:
        run: where it stands; `step` moves it on.
        reader: of the training data.
        saves: of the run.
        asked_to_stop: whether this rank was asked to stop; asked once a step.
    """

    def __init__(self, run: Run, reader: Reader, saves: Saves, asked_to_stop: Callable[[], bool]) -> None:
        self.run, self.reader, self.saves = run, reader, saves
        self._asked_to_stop = asked_to_stop

    def step(self) -> bool:
        """Make one step, or go back to a checkpoint where the recipe wants it after a fault.

        Returns:
            Whether some rank was asked to stop.

        Raises:
            FaultyStep: a loss or gradient was not finite or spiked, and the recipe stops there.
            UserError: an asynchronous save has failed.
        """
        run = self.run
        run.watchdog.tick(f"step {run.step + 1}")
        device.synchronize()
        began = time.perf_counter()
        batch, factor = self._batch(), run.factor()
        loss = self._accumulate(batch, factor)
        stop = self._asked_to_stop() or run.observers.failure is not None
        verdict = guards.exchange(loss, stop=stop, saved=run.checkpointer.settled())
        if verdict.saved:
            self.saves.settle()  # raises what went wrong, on all ranks in the same step
        run.observers.before_update(run.step + 1)
        fault, norm = self._update(verdict.loss)
        if fault is not None:
            answer = run.faults.answer(fault)
            if answer == "rollback":
                go_back(run, self.saves, fault, batch.first, batch.samples)
                return verdict.stop
            if answer == "stop" or not run.faults.skip():
                stop_before_update(run, self.saves, fault, batch.first, batch.samples)
        run.step += 1
        device.synchronize()
        run.observers.step(
            StepRecord(
                step=run.step,
                tokens=run.plan.tokens(run.step),
                loss=verdict.loss,
                lr=run.recipe.optimizer.lr * factor,
                gradient_norm=norm,
                seconds=time.perf_counter() - began,
                step_tokens=batch.samples * run.recipe.data.sequence_length,
                sequence_length=batch.length,
                memory_bytes=device.peak_memory_bytes(),
                skipped=None if fault is None else fault.at(run.step, batch.first, batch.samples),
            )
        )
        return verdict.stop

    def _batch(self) -> Batch:
        run = self.run
        return Batch(
            first=run.plan.samples(run.step) + run.faults.offset,
            samples=run.plan.global_batch_size(run.step),
            length=run.plan.row_length(run.step),
        )

    def _accumulate(self, batch: Batch, factor: float) -> torch.Tensor:
        engine = self.run.engine
        accumulation = engine.set_global_batch_size(batch.samples)
        engine.set_rates(factor)
        engine.set_sequence_length(batch.length)
        micro_batches = self.reader.micro_batches(batch.first, batch.samples, batch.length)
        return engine.accumulate(micro_batches, accumulation, self.run.objective)

    def _update(self, loss: float) -> tuple[Fault | None, float | None]:
        """Make the update unless something is wrong with the step.

        Returns:
            The fault for which no update was made, and the gradient norm as far as it is known.
        """
        engine, faults = self.run.engine, self.run.faults
        fault, norm = faults.judge(LOSS, loss), None
        if fault is None and faults.judges_spikes:
            norm = guards.agree(engine.gradient_norm())
            fault = faults.judge(GRADIENT_NORM, norm)
        if fault is not None:
            engine.discard()
            return fault, norm
        update = engine.step()
        norm = update.gradient_norm if norm is None else norm
        if not update.applied:
            return Fault(GRADIENT_NORM, norm), norm
        faults.applied(loss, norm)
        return None, norm
