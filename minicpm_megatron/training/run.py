"""Run: what a run on one rank consists of, and where it stands."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.methods.schedules import Schedule
from minicpm_megatron.recipe import BatchPlan, Layout, Recipe
from minicpm_megatron.training.faults import FaultPolicy
from minicpm_megatron.training.objective import Objective
from minicpm_megatron.training.observation import Observers
from minicpm_megatron.training.run_data import RunData
from minicpm_megatron.training.watchdog import Watchdog


@dataclass
class Run:
    """One run on this rank; `training.building` makes it.

    Attributes:
        recipe, layout: what is run, and on how many ranks.
        objective: what is minimised.
        step: steps done.
        evaluation_due: the evaluation at `step` has not been made.
        origin: what the run began from, see `RunState.origin`.
        resumed_from: the run's own checkpoint that it goes on from; None: it begins.
        text: of an imported model: what its folder says about the texts it makes, for an export at the end.
    """

    recipe: Recipe
    layout: Layout
    data: RunData
    engine: Engine
    engine_state: EngineState
    schedule: Schedule
    plan: BatchPlan
    checkpointer: Checkpointer
    watchdog: Watchdog
    faults: FaultPolicy
    observers: Observers
    objective: Objective
    step: int = 0
    evaluation_due: bool = False
    origin: Mapping[str, Any] | None = None
    text: Mapping[str, Any] | None = None
    resumed_from: Path | None = None

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.recipe.run_directory

    @property
    def total(self) -> int:
        """Steps of the whole run, where training.stop_after does not end it before."""
        return self.plan.last_step()

    def factor(self) -> float:
        """The schedule's factor for the update after `step`."""
        return self.schedule.factor(self.plan.position(self.step))
