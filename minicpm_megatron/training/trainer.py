"""The loop of one run, from its start or a checkpoint to its last step."""

from __future__ import annotations

import datetime
import functools
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from minicpm_megatron.checkpoint import Checkpointer, LoadedCheckpoint
from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.checkpoint.run_state import FaultEvent, RunState
from minicpm_megatron.engine.build import build_engine, build_model
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.initialize import initialize_parameters
from minicpm_megatron.parallel import device, groups
from minicpm_megatron.parallel.determinism import make_deterministic
from minicpm_megatron.recipe import BatchPlan, Recipe, count_parameters, dump_recipe, recipe_hash
from minicpm_megatron.recipe.dump import RECIPE
from minicpm_megatron.recipe.parameters import CHECKPOINT_BYTES
from minicpm_megatron.storage.atomic import write_bytes, write_json
from minicpm_megatron.storage.manifest import TOKENIZER_SHA256
from minicpm_megatron.training import guards
from minicpm_megatron.training.datasets import held_out_sets, train_reader
from minicpm_megatron.training.evaluate import HeldOut, evaluate
from minicpm_megatron.training.expert_load import take_loads
from minicpm_megatron.training.faults import GRADIENT_NORM, LOSS, Fault, FaultPolicy, FaultyStep
from minicpm_megatron.training.flops import device_peak, flops_per_token
from minicpm_megatron.training.gradient_log import GradientLog
from minicpm_megatron.training.launcher import Launcher
from minicpm_megatron.training.metrics import MetricsLog, StepRecord
from minicpm_megatron.training.run_data import MIXTURE, check_unchanged, keep_order, open_data
from minicpm_megatron.training.start import Origin, Published, check_resume
from minicpm_megatron.training.watchdog import Watchdog


class Trainer:
    """One run on all ranks of the job.

    Args:
        recipe: what to run; must be trainable and fit the number of ranks.
        origin: the checkpoint that the run starts from where it has none of its own; None: it starts from nothing.
        watchdog: already watching, over the start, too.
        launcher: what started this rank.

    Raises:
        UserError: data, layout, DeepSpeed JSON or checkpoints do not fit the recipe.
    """

    def __init__(self, recipe: Recipe, origin: Origin | None, watchdog: Watchdog, launcher: Launcher) -> None:
        self.recipe, self.watchdog, self.launcher = recipe, watchdog, launcher
        self.layout = recipe.check_world_size(groups.world_size())
        watchdog.tick("start-up: opening the data")
        self.data = open_data(recipe)  # what is wrong with the data is told before the ranks wait for each other
        # longer than the watchdog's patience, so that it speaks before torch.distributed gives up without a name
        patience = datetime.timedelta(seconds=2 * recipe.training.hang_timeout + 60)
        if recipe.training.deterministic:
            make_deterministic()
        watchdog.tick("start-up: meeting the other ranks")
        name = str(recipe.run_directory)
        groups.initialize(self.layout, timeout=patience, seed=recipe.training.seed, job=name)
        self.folder = recipe.run_directory
        self.checkpointer = Checkpointer(
            self.folder / CHECKPOINTS,
            keep_last=recipe.checkpoint.keep_last,
            keep_every=recipe.checkpoint.keep_every,
            keep_steps=recipe.checkpoint.steps,
            on_corrupt=recipe.checkpoint.on_corrupt,
            # of its own, for the thread that saves; over gloo, so that it waits for no kernel
            group=dist.new_group(backend="gloo", timeout=patience),
            on_phase=lambda phase: self.watchdog.tick(f"saving step {self.step}: {phase}"),
            # tens of gigabytes a rank take longer on a slow disk than a rank may be silent
            on_progress=lambda path: self.watchdog.tick(f"verifying {path}"),
        )
        watchdog.tick("start-up: looking at the run's folder")
        self.checkpointer.preflight(count_parameters(recipe.model).total * CHECKPOINT_BYTES)
        watchdog.tick("start-up: building the model")
        self.config = MiniCPMConfig.from_recipe(recipe, perform_initialization=False)
        model = build_model(self.config, recipe)
        watchdog.tick("start-up: verifying the newest checkpoint")
        newest = self.checkpointer.find_latest()
        watchdog.tick("start-up: building the engine")
        if newest is None and origin is None:
            initialize_parameters(model, self.config, recipe.training.seed)
        self.engine = build_engine(model, self.config, recipe, self.layout)
        self.state = EngineState(self.engine)
        self.gradients = GradientLog(recipe.logging.gradient_statistics, self.state)
        self.schedule, self.plan = build_schedule(recipe.schedule), BatchPlan(recipe)
        self.step = 0
        self.faults = FaultPolicy(recipe.faults)
        self.origin: Mapping[str, Any] | None = None
        # of an imported model: what its folder says about the texts it makes, for an export at the end
        self.text: Mapping[str, Any] | None = None
        self.evaluation_due = False
        # what libraries drew at start-up is not the run's; a checkpoint's own state replaces this
        groups.seed_generators(recipe.training.seed)
        watchdog.tick("start-up: loading the checkpoint")
        if newest is not None:
            self._resume(newest)
        elif origin is not None:
            self._start_from(origin)
        self.total = self.plan.last_step()
        self.engine.set_rates(self.schedule.factor(self.plan.position(self.step)))
        self.engine.check_rates(self.schedule.factor(self.plan.position(self.step)))

    def run(self) -> int:
        """Train to the end, or until a signal asks to stop.

        Returns:
            Steps done.

        Raises:
            FaultyStep: a loss or gradient was not finite or spiked, and the recipe stops there.
            UserError: a checkpoint or the metrics could not be written.
        """
        main = groups.rank() == 0
        self.watchdog.tick("start-up: writing the run's files")
        self.checkpointer.on_first(self._write_run_files)
        reader, sets = train_reader(self.recipe, self.data), held_out_sets(self.recipe, self.data)
        peak = device_peak(self.recipe.training.precision)
        if main:
            print(peak.describe(), flush=True)
        log = MetricsLog(
            self.folder if main else None,
            self.recipe,
            start=self.step,
            total=self.total,
            flops_per_token=functools.partial(flops_per_token, self.recipe.model),
            peak_flops=peak.flops * self.layout.world_size,
            evaluate_again=self.evaluation_due,
        )
        self.checkpointer.on_all(log.check)
        signals = guards.SignalGuard(self.launcher)
        try:
            with log:
                self.engine.train()
                if self.evaluation_due:
                    self._evaluate(log, sets)
                while self.step < self.total:
                    before = self.step
                    stop = self._one_step(reader, log, signals)
                    if self.step <= before:  # gone back; whoever asked to stop is heard after the next step
                        continue
                    interval = self.recipe.evaluation.interval
                    self.evaluation_due = bool(interval and (self.step % interval == 0 or self.step == self.total))
                    # who asked to stop does not want to wait; a resumed run makes up for it
                    if self.evaluation_due and not stop:
                        self._evaluate(log, sets)
                    saves = self.recipe.checkpoint
                    last = stop or self.step == self.total
                    if last or self.step in saves.steps or saves.interval and self.step % saves.interval == 0:
                        began = time.perf_counter()
                        self._save(wait=last or not self.recipe.checkpoint.async_save)
                        log.saved(self.step, time.perf_counter() - began)
                    if stop:
                        cause = "a failure to write metrics" if log.failure else signals.received or "another rank"
                        guards.announce(
                            f"stopped after step {self.step} by {cause}; checkpoint saved, start again to go on"
                        )
                        break
        finally:
            signals.restore()
        if self.step == self.total and log.failure is not None:
            guards.announce(f"note: the run is finished and saved, but {log.failure.where}: {log.failure.what}")
        else:
            log.check()
        return self.step

    def _evaluate(self, log: MetricsLog, sets: dict[str, HeldOut]) -> None:
        results = evaluate(self.engine, sets, on_batch=lambda name: self.watchdog.tick(f"evaluating {name}"))
        log.evaluation(self.step, self.plan.tokens(self.step), results)
        self.evaluation_due = False

    def _one_step(self, reader: Any, log: MetricsLog, signals: guards.SignalGuard) -> bool:
        self.watchdog.tick(f"step {self.step + 1}")
        device.synchronize()
        began = time.perf_counter()
        samples = self.plan.global_batch_size(self.step)
        accumulation = self.engine.set_global_batch_size(samples)
        factor = self.schedule.factor(self.plan.position(self.step))
        self.engine.set_rates(factor)
        first = self.plan.samples(self.step) + self.faults.offset
        length = self.plan.row_length(self.step)
        self.engine.set_sequence_length(length)
        loss = self.engine.accumulate(reader.micro_batches(first, samples, length), accumulation)
        verdict = guards.exchange(
            loss, stop=signals.requested() or log.failure is not None, saved=self.checkpointer.settled()
        )
        if verdict.saved:
            self.checkpointer.wait()  # raises what went wrong, on all ranks in the same step
        self.gradients.before_update(self.step + 1, log)
        fault, norm = self._update(verdict.loss)
        if fault is not None:
            self.gradients.forget()
            answer = self.faults.answer(fault)
            if answer == "rollback":
                self._roll_back(fault, first, samples, log)
                return verdict.stop
            if answer == "stop" or not self.faults.skip():
                self._stop_before(fault, first, samples)
        self.step += 1
        device.synchronize()
        log.step(
            StepRecord(
                step=self.step,
                tokens=self.plan.tokens(self.step),
                loss=verdict.loss,
                lr=self.recipe.optimizer.lr * factor,
                gradient_norm=norm,
                seconds=time.perf_counter() - began,
                step_tokens=samples * self.recipe.data.sequence_length,
                sequence_length=length,
                skipped=None if fault is None else fault.at(self.step, first, samples),
            ),
            device.peak_memory_bytes(),
        )
        if self.step % self.recipe.logging.interval == 0 or self.step == self.total:
            log.experts(self.step, take_loads(self.engine.module, self.config))
        return verdict.stop

    def _update(self, loss: float) -> tuple[Fault | None, float | None]:
        """Make the update unless something is wrong with the step.

        Returns:
            The fault for which no update was made, and the gradient norm as far as it is known.
        """
        fault, norm = self.faults.judge(LOSS, loss), None
        if fault is None and self.faults.judges_spikes:
            norm = guards.agree(self.engine.gradient_norm())
            fault = self.faults.judge(GRADIENT_NORM, norm)
        if fault is not None:
            self.engine.discard()
            return fault, norm
        update = self.engine.step()
        norm = update.gradient_norm if norm is None else norm
        if not update.applied:
            return Fault(GRADIENT_NORM, norm), norm
        self.faults.applied(loss, norm)
        return None, norm

    def _stop_before(self, fault: Fault, first: int, samples: int) -> None:
        """Save the weights before the update, with what happened, and end the run."""
        event = FaultEvent(
            what=fault.what,
            value=str(fault.value),
            step=self.step + 1,
            samples=(first, first + samples),
            lr=self.recipe.optimizer.lr * self.schedule.factor(self.plan.position(self.step)),
        )
        path, said = self._save(wait=True, fault=event), fault.at(self.step + 1, first, samples)
        if self.faults.answer(fault) == "skip":
            said += f"; {self.recipe.faults.max_consecutive} steps before it were skipped (faults.max_consecutive)"
        raise FaultyStep(f"{said}; the state before it is saved in {path}")

    def _roll_back(self, fault: Fault, first: int, samples: int, log: MetricsLog) -> None:
        """Go back to the newest checkpoint, and on from the data after the faulty batch."""
        self.watchdog.tick(f"rolling back from step {self.step + 1}")
        said = fault.at(self.step + 1, first, samples)
        folder = self.checkpointer.find_latest()
        if folder is None:
            raise FaultyStep(f"{said}; there is no checkpoint to go back to")
        self._load(self.checkpointer.open(folder))
        end = first + samples * (1 + self.recipe.faults.rollback_skip)
        if not self.faults.roll_back(self.step, self.plan.samples(self.step), end):
            times = self.recipe.faults.max_consecutive
            raise FaultyStep(f"{said}; {times} rollbacks to {folder} have not helped (faults.max_consecutive)")
        self._save(wait=True)  # a run that is killed from now on must not read what was passed over
        passed = self.faults.passed_over[-1]
        log.rewind(self.step)
        log.event(
            self.step,
            f"rolled back to step {self.step}: {said}; passing over samples {passed[0]} to {passed[1] - 1}",
        )

    def _save(self, *, wait: bool, fault: FaultEvent | None = None) -> Path:
        state = RunState(
            step=self.step,
            samples=self.plan.samples(self.step),
            tokens=self.plan.tokens(self.step),
            updates=self.state.updates(),
            origin=self.origin,
            text=self.text,
            rates={group["name"]: group["lr"] for group in self.engine.param_groups},
            evaluation_due=self.evaluation_due,
            fault=fault,
            faults=self.faults.state(),
        )
        facts: dict[str, Any] = {
            "model": self.recipe.model.model_dump(mode="json"),
            "recipe": self.recipe.model_dump(mode="json"),
            "recipe_hash": recipe_hash(self.recipe),
            "layout": {
                **self.recipe.parallel.model_dump(mode="json"),
                "world_size": self.layout.world_size,
                "zero_stage": self.recipe.deepspeed.zero_stage,
            },
            "data": self.data.fingerprint,
            MIXTURE: self.data.train.mixture.method,
        }
        if self.data.tokenizer_sha256 is not None:
            facts[TOKENIZER_SHA256] = self.data.tokenizer_sha256
        return self.checkpointer.save(
            self.step, self.state.fragments(), rank_tensors=device.rng_state(), state=state, facts=facts, wait=wait
        )

    def _resume(self, folder: Path) -> None:
        loaded = self.checkpointer.open(folder)
        check_resume(loaded.manifest, self.recipe, self.data.fingerprint)
        self._load(loaded)
        self.origin, self.text = loaded.state.origin, loaded.state.text
        self.evaluation_due = loaded.state.evaluation_due
        if groups.rank() == 0:
            print(f"resuming from {folder} at step {self.step}", flush=True)

    def _start_from(self, origin: Origin) -> None:
        if origin.published is not None:
            self._start_with(origin, origin.published)
            return
        loaded = self.checkpointer.open(origin.folder, verified=False)
        if origin.goes_on:
            self._load(loaded)
            said = f"branching from {origin.reference} ({origin.folder}) at step {self.step}"
        else:
            self.engine.ledger.check_saved(loaded.state.rates)
            self.state.load(loaded.reader, loaded.state.updates or 0, self._loading)
            self.evaluation_due = self.recipe.evaluation.interval is not None
            said = f"starting with the weights and moments of {origin.reference} ({origin.folder})"
        self.origin = {"run": str(origin.folder.parent.parent), "step": origin.step}
        self.text = loaded.state.text
        if groups.rank() == 0:
            print(said, flush=True)

    def _start_with(self, origin: Origin, open_folder: Callable[[], Published]) -> None:
        published = self.checkpointer.on_all(open_folder)
        self.checkpointer.on_all(lambda: self.state.load(published.weights, 0, self._loading))
        self.evaluation_due = self.recipe.evaluation.interval is not None
        self.origin, self.text = {"run": str(origin.folder), "step": origin.step}, published.text
        if groups.rank() == 0:
            print(f"starting with the weights of {origin.reference}", flush=True)

    def _loading(self, name: str) -> None:
        self.watchdog.tick(f"loading {name}")

    def _load(self, loaded: LoadedCheckpoint) -> None:
        state = loaded.state
        check_unchanged(loaded.manifest.get("data") or {}, self.data.fingerprint)
        keep_order(loaded.manifest, self.recipe, self.data)
        self.engine.ledger.check_saved(state.rates)
        self.step = state.step
        self.state.load(loaded.reader, state.updates or 0, self._loading)
        self.faults.load(state.faults)
        tensors = loaded.rank_tensors(groups.rank())
        if tensors:
            device.set_rng_state(tensors)
        if state.samples not in (None, self.plan.samples(self.step)):
            raise UserError(
                f"the checkpoint has consumed {state.samples} samples, this recipe's batches make it "
                f"{self.plan.samples(self.step)} at step {self.step}",
                where="training.global_batch_size",
                fix="set the batch sizes back",
            )

    def _write_run_files(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_bytes(self.folder / RECIPE, dump_recipe(self.recipe).encode())
        write_json(self.folder / "deepspeed.json", self.engine.deepspeed_config)
