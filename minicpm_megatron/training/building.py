"""Start-up: everything that a run consists of, built and checked in the order in which it can be refused."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Mapping

import torch.distributed as dist

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.engine.build import build_engine, build_model
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.initialize import initialize_parameters
from minicpm_megatron.parallel import groups
from minicpm_megatron.parallel.determinism import make_deterministic
from minicpm_megatron.recipe import BatchPlan, Recipe, count_parameters
from minicpm_megatron.recipe.parameters import CHECKPOINT_BYTES
from minicpm_megatron.registry import OBJECTIVES
from minicpm_megatron.training.faults import FaultPolicy
from minicpm_megatron.training.loading import resume, start_from
from minicpm_megatron.training.objective import Objective
from minicpm_megatron.training.observation import Factory, Observers, observer_factories
from minicpm_megatron.training.run import Run
from minicpm_megatron.training.run_data import open_data
from minicpm_megatron.training.start import Origin
from minicpm_megatron.training.watchdog import Watchdog


def build_run(
    recipe: Recipe,
    origin: Origin | None,
    watchdog: Watchdog,
    *,
    observers: Mapping[str, Factory] | None = None,
    objective: Callable[[Recipe], Objective] | None = None,
) -> Run:
    """Build a run on this rank, and load the checkpoint that it goes on from.

    Args:
        recipe: must be trainable and fit the number of ranks.
        origin: the checkpoint that the run starts from where it has none of its own; None: it starts from nothing.
        watchdog: already watching, over the start, too.
        observers: beside the recipe's.
        objective: makes it, in place of the recipe's.

    Raises:
        UserError: data, layout, DeepSpeed JSON, plugins or checkpoints do not fit the recipe.
    """
    layout = recipe.check_world_size(groups.world_size())
    watchdog.tick("start-up: opening the data")
    data = open_data(recipe)  # what is wrong with the data is told before the ranks wait for each other
    # longer than the watchdog's patience, so that it speaks before torch.distributed gives up without a name
    patience = datetime.timedelta(seconds=2 * recipe.training.hang_timeout + 60)
    if recipe.training.deterministic:
        make_deterministic()
    watchdog.tick("start-up: meeting the other ranks")
    groups.initialize(layout, timeout=patience, seed=recipe.training.seed, job=str(recipe.run_directory))
    checkpointer = _checkpointer(recipe, patience, watchdog)
    watchdog.tick("start-up: looking at the run's folder")
    checkpointer.preflight(count_parameters(recipe.model).total * CHECKPOINT_BYTES)
    watchdog.tick("start-up: building the observers")
    factories = checkpointer.on_all(lambda: observer_factories(recipe)) | dict(observers or {})
    make_objective = objective or checkpointer.on_all(lambda: OBJECTIVES.get(recipe.training.objective))
    watching = Observers(factories, recipe, checkpointer.ranks, on_wait=watchdog.tick)
    watchdog.tick("start-up: building the model")
    config = MiniCPMConfig.from_recipe(recipe, perform_initialization=False)
    model = build_model(config, recipe)
    watchdog.tick("start-up: verifying the newest checkpoint")
    newest = checkpointer.find_latest()
    watchdog.tick("start-up: building the engine")
    if newest is None and origin is None:
        initialize_parameters(model, config, recipe.training.seed)
    engine = build_engine(model, config, recipe, layout)
    run = Run(
        recipe=recipe,
        layout=layout,
        data=data,
        engine=engine,
        engine_state=EngineState(engine),
        schedule=build_schedule(recipe),
        plan=BatchPlan(recipe),
        checkpointer=checkpointer,
        watchdog=watchdog,
        faults=FaultPolicy(recipe.faults),
        observers=watching,
        objective=make_objective(recipe),
    )
    checkpointer.on_phase = lambda phase: watchdog.tick(f"saving step {run.step}: {phase}")
    # what libraries drew at start-up is not the run's; a checkpoint's own state replaces this
    groups.seed_generators(recipe.training.seed)
    watchdog.tick("start-up: loading the checkpoint")
    if newest is not None:
        resume(run, newest)
    elif origin is not None:
        start_from(run, origin)
    engine.set_rates(run.factor())
    engine.check_rates(run.factor())
    return run


def _checkpointer(recipe: Recipe, patience: datetime.timedelta, watchdog: Watchdog) -> Checkpointer:
    return Checkpointer(
        recipe.run_directory / CHECKPOINTS,
        keep_last=recipe.checkpoint.keep_last,
        keep_every=recipe.checkpoint.keep_every,
        keep_steps=recipe.checkpoint.steps,
        on_corrupt=recipe.checkpoint.on_corrupt,
        # of its own, for the thread that saves; over gloo, so that it waits for no kernel
        group=dist.new_group(backend="gloo", timeout=patience),
        # tens of gigabytes a rank take longer on a slow disk than a rank may be silent
        on_progress=lambda path: watchdog.tick(f"verifying {path}"),
    )
