"""What is done about a step with a fault where it is not skipped: the run stops before the update, or goes back."""

from __future__ import annotations

from typing import NoReturn

from minicpm_megatron.checkpoint.run_state import FaultEvent
from minicpm_megatron.training.faults import Fault, FaultyStep
from minicpm_megatron.training.loading import load
from minicpm_megatron.training.run import Run
from minicpm_megatron.training.saving import Saves


def stop_before_update(run: Run, saves: Saves, fault: Fault, first: int, samples: int) -> NoReturn:
    """Save the weights before the update, with what happened, and end the run.

    Args:
        first, samples: of the step's global batch.

    Raises:
        FaultyStep: always.
    """
    event = FaultEvent(
        what=fault.what,
        value=str(fault.value),
        step=run.step + 1,
        samples=(first, first + samples),
        lr=run.recipe.optimizer.lr * run.factor(),
    )
    path, said = saves.save(wait=True, fault=event), fault.at(run.step + 1, first, samples)
    if run.faults.answer(fault) == "skip":
        said += f"; {run.recipe.faults.max_consecutive} steps before it were skipped (faults.max_consecutive)"
    raise FaultyStep(f"{said}; the state before it is saved in {path}")


def go_back(run: Run, saves: Saves, fault: Fault, first: int, samples: int) -> None:
    """Go back to the newest checkpoint, and on from the data after the faulty batch.

    Args:
        first, samples: of the step's global batch.

    Raises:
        FaultyStep: there is no checkpoint, or too many rollbacks to it have not helped.
    """
    run.watchdog.tick(f"rolling back from step {run.step + 1}")
    said = fault.at(run.step + 1, first, samples)
    folder = run.checkpointer.find_latest()
    if folder is None:
        raise FaultyStep(f"{said}; there is no checkpoint to go back to")
    loaded = run.checkpointer.open(folder)
    load(run, loaded)
    run.observers.load_state_dict(loaded.state.observers)
    end = first + samples * (1 + run.recipe.faults.rollback_skip)
    if not run.faults.roll_back(run.step, run.plan.samples(run.step), end):
        times = run.recipe.faults.max_consecutive
        raise FaultyStep(f"{said}; {times} rollbacks to {folder} have not helped (faults.max_consecutive)")
    saves.save(wait=True)  # a run that is killed from now on must not read what was passed over
    passed = run.faults.passed_over[-1]
    run.observers.rewind(
        run.step, f"rolled back to step {run.step}: {said}; passing over samples {passed[0]} to {passed[1] - 1}"
    )
