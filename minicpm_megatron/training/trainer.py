"""The loop of one run, from its start or a checkpoint to its last step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training import guards
from minicpm_megatron.training.building import build_run
from minicpm_megatron.training.datasets import held_out_sets, train_reader
from minicpm_megatron.training.evaluate import HeldOut, evaluate
from minicpm_megatron.training.flops import device_peak, flops_per_token
from minicpm_megatron.training.launcher import Launcher
from minicpm_megatron.training.objective import Objective, check_needs
from minicpm_megatron.training.observation import Factory
from minicpm_megatron.training.observer import Evaluation, RunInfo
from minicpm_megatron.training.run_data import RunData
from minicpm_megatron.training.saving import Saves, write_run_files
from minicpm_megatron.training.start import Origin
from minicpm_megatron.training.stepping import Reader, Stepper
from minicpm_megatron.training.watchdog import Watchdog


class Trainer:
    """One run on all ranks of the job.

    Args:
        recipe: what to run; must be trainable and fit the number of ranks.
        origin: the checkpoint that the run starts from where it has none of its own; None: it starts from nothing.
        watchdog: already watching, over the start, too.
        launcher: what started this rank.
        observers: name -> what makes an observer, beside those of the recipe.
        objective: makes what is minimised, in place of the recipe's.
        read: opens the training data of this rank.
        make_stepper: makes what makes the steps.

    Raises:
        UserError: data, layout, DeepSpeed JSON or checkpoints do not fit the recipe.
    """

    def __init__(
        self,
        recipe: Recipe,
        origin: Origin | None,
        watchdog: Watchdog,
        launcher: Launcher,
        *,
        observers: Mapping[str, Factory] | None = None,
        objective: Callable[[Recipe], Objective] | None = None,
        read: Callable[[Recipe, RunData], Reader] = train_reader,
        make_stepper: Callable[..., Stepper] = Stepper,
    ) -> None:
        self._launcher, self._read, self._make_stepper = launcher, read, make_stepper
        self._run = build_run(recipe, origin, watchdog, observers=observers, objective=objective)
        self._saves = Saves(self._run)
        self.total = self._run.total

    def run(self) -> int:
        """Train to the end, or until a signal asks to stop.

        Returns:
            Steps done.

        Raises:
            FaultyStep: a loss or gradient was not finite or spiked, and the recipe stops there.
            UserError: a checkpoint or the metrics could not be written.
        """
        run = self._run
        run.watchdog.tick("start-up: waiting for ranks that still load, to write the run's files")
        run.checkpointer.on_first(lambda: write_run_files(run))
        reader, sets = self._read(run.recipe, run.data), held_out_sets(run.recipe, run.data)
        check_needs(run.objective, reader, run.recipe)
        run.observers.start(self._info())
        run.checkpointer.on_all(run.observers.check)
        if run.resumed_from is not None:
            run.observers.checkpoint(run.resumed_from)
        signals = guards.SignalGuard(self._launcher)
        try:
            stepper = self._make_stepper(run, reader, self._saves, signals.requested)
            run.engine.train()
            if run.evaluation_due:
                self._evaluate(sets)
            stop = False
            while run.step < run.total and not stop:
                stop = self._advance(stepper, sets)
            if stop:
                cause = "a failure to write metrics" if run.observers.failure else signals.received or "another rank"
                guards.announce(f"stopped after step {run.step} by {cause}; checkpoint saved, start again to go on")
        finally:
            run.observers.end()
            signals.restore()
        failure = run.observers.failure
        if run.step == run.total and failure is not None:
            guards.announce(f"note: the run is finished and saved, but {failure.where}: {failure.what}")
        else:
            run.observers.check()
        return run.step

    def _advance(self, stepper: Stepper, sets: dict[str, HeldOut]) -> bool:
        """One step with the evaluation and the save that follow it; returns whether to stop."""
        run, before = self._run, self._run.step
        stop = stepper.step()
        if run.step <= before:  # gone back; whoever asked to stop is heard after the next step
            return False
        interval = run.recipe.evaluation.interval
        run.evaluation_due = bool(interval and (run.step % interval == 0 or run.step == run.total))
        # who asked to stop does not want to wait; a resumed run makes up for it
        if run.evaluation_due and not stop:
            self._evaluate(sets)
        saves, last = run.recipe.checkpoint, stop or run.step == run.total
        if last or run.step in saves.steps or saves.interval and run.step % saves.interval == 0:
            self._saves.save_step(wait=last or not saves.async_save)
        return stop

    def _evaluate(self, sets: dict[str, HeldOut]) -> None:
        run = self._run
        losses = evaluate(run.engine, sets, on_batch=lambda name: run.watchdog.tick(f"evaluating {name}"))
        run.observers.evaluation(Evaluation(run.step, run.plan.tokens(run.step), losses))
        run.evaluation_due = False

    def _info(self) -> RunInfo:
        run = self._run
        peak = device_peak(run.recipe.training.precision)
        if groups.rank() == 0:
            print(peak.describe(), flush=True)
        return RunInfo(
            recipe=run.recipe,
            folder=run.folder,
            rank=groups.rank(),
            start=run.step,
            total=run.total,
            evaluation_due=run.evaluation_due,
            flops_per_token=functools.partial(flops_per_token, run.recipe.model),
            peak_flops=peak.flops * run.layout.world_size,
            tell=run.observers.tell,
            model=run.engine.module,
            config=run.engine.config,
            engine_state=run.engine_state,
        )
