"""Saving: the run's state as a checkpoint, and the files that a run's folder holds beside its checkpoints."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from minicpm_megatron.checkpoint.run_state import FaultEvent, RunState
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import dump_recipe, recipe_hash
from minicpm_megatron.recipe.dump import RECIPE
from minicpm_megatron.storage.atomic import write_bytes, write_json
from minicpm_megatron.storage.manifest import TOKENIZER_SHA256
from minicpm_megatron.training.run import Run
from minicpm_megatron.training.run_data import MIXTURE


class Saves:
    """The saves of a run, which observers hear of once a checkpoint is published."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._under_way: Path | None = None

    def save(self, *, wait: bool, fault: FaultEvent | None = None) -> Path:
        """Save the run as it stands.

        Args:
            wait: return when the checkpoint is published. False: when the state is in host memory.
            fault: why the run stops here.

        Raises:
            UserError: this save, or the asynchronous one before it, failed; on every rank alike.
        """
        path = self._begin(wait, fault)
        if wait:
            self.settle()
        return path

    def save_step(self, *, wait: bool) -> None:
        """`save`, and tell the observers for how long training waited."""
        began = time.perf_counter()
        self._begin(wait, None)
        self._run.observers.save(self._run.step, time.perf_counter() - began)
        if wait:
            self.settle()

    def settle(self) -> None:
        """Wait for the save that is under way, if there is one, and tell the observers of its checkpoint."""
        self._run.checkpointer.wait()
        path, self._under_way = self._under_way, None
        if path is not None:
            self._run.observers.checkpoint(path)

    def _begin(self, wait: bool, fault: FaultEvent | None) -> Path:
        run = self._run
        self.settle()
        self._under_way = run.checkpointer.save(
            run.step,
            run.engine_state.fragments(),
            rank_tensors=device.rng_state(),
            state=_state(run, fault),
            facts=_facts(run),
            wait=wait,
        )
        return self._under_way


def write_run_files(run: Run) -> None:
    """Write the resolved recipe and the DeepSpeed JSON into the run's folder."""
    run.folder.mkdir(parents=True, exist_ok=True)
    write_bytes(run.folder / RECIPE, dump_recipe(run.recipe).encode())
    write_json(run.folder / "deepspeed.json", run.engine.deepspeed_config)


def _state(run: Run, fault: FaultEvent | None) -> RunState:
    return RunState(
        step=run.step,
        samples=run.plan.samples(run.step),
        tokens=run.plan.tokens(run.step),
        updates=run.engine_state.updates(),
        origin=run.origin,
        text=run.text,
        rates={group["name"]: group["lr"] for group in run.engine.param_groups},
        evaluation_due=run.evaluation_due,
        fault=fault,
        faults=run.faults.state(),
        observers=run.observers.state_dict(),
    )


def _facts(run: Run) -> dict[str, Any]:
    """What a manifest says beside the state: what was run, and on what."""
    facts: dict[str, Any] = {
        "model": run.recipe.model.model_dump(mode="json"),
        "recipe": run.recipe.model_dump(mode="json"),
        "recipe_hash": recipe_hash(run.recipe),
        "layout": {
            **run.recipe.parallel.model_dump(mode="json"),
            "world_size": run.layout.world_size,
            "zero_stage": run.recipe.deepspeed.zero_stage,
        },
        "data": run.data.fingerprint,
        MIXTURE: run.data.train.mixture.method,
    }
    if run.data.tokenizer_sha256 is not None:
        facts[TOKENIZER_SHA256] = run.data.tokenizer_sha256
    return facts
