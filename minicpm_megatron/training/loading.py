"""Loading: a run's own newest checkpoint, another run's, or published weights, into the run's engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from minicpm_megatron.checkpoint import LoadedCheckpoint
from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel import device, groups
from minicpm_megatron.training.run import Run
from minicpm_megatron.training.run_data import check_unchanged, keep_order
from minicpm_megatron.training.start import Origin, Published, check_resume


def resume(run: Run, folder: Path) -> None:
    """Go on from a checkpoint of the run's own, which `Checkpointer.find_latest` has verified.

    Raises:
        UserError: the recipe or the data would have changed steps already trained.
    """
    loaded = run.checkpointer.open(folder)
    check_resume(loaded.manifest, run.recipe, run.data.fingerprint)
    load(run, loaded)
    run.origin, run.text = loaded.state.origin, loaded.state.text
    run.evaluation_due = loaded.state.evaluation_due
    run.observers.load_state_dict(loaded.state.observers)
    run.resumed_from = folder
    _say(f"resuming from {folder} at step {run.step}")


def start_from(run: Run, origin: Origin) -> None:
    """Begin from the checkpoint of another run, or from a published folder.

    Raises:
        UserError: the checkpoint is damaged, or was trained with other muP factors.
    """
    if origin.published is not None:
        _start_with(run, origin, origin.published)
        return
    loaded = run.checkpointer.open(origin.folder, verified=False)
    if origin.goes_on:
        load(run, loaded)
        said = f"branching from {origin.reference} ({origin.folder}) at step {run.step}"
    else:
        run.engine.ledger.check_saved(loaded.state.rates)
        run.engine_state.load(loaded.reader, loaded.state.updates or 0, _ticking(run))
        run.evaluation_due = run.recipe.evaluation.interval is not None
        said = f"starting with the weights and moments of {origin.reference} ({origin.folder})"
    run.origin = {"run": str(origin.folder.parent.parent), "step": origin.step}
    run.text = loaded.state.text
    _say(said)


def _start_with(run: Run, origin: Origin, open_folder: Callable[[], Published]) -> None:
    published = run.checkpointer.on_all(open_folder)
    run.checkpointer.on_all(lambda: run.engine_state.load(published.weights, 0, _ticking(run)))
    run.evaluation_due = run.recipe.evaluation.interval is not None
    run.origin, run.text = {"run": str(origin.folder), "step": origin.step}, published.text
    _say(f"starting with the weights of {origin.reference}")


def load(run: Run, loaded: LoadedCheckpoint) -> None:
    """Take weights, moments, random state, faults and the step of a checkpoint over.

    Raises:
        UserError: the data have changed, the muP factors differ, or the batches make other samples of the step.
    """
    state = loaded.state
    check_unchanged(loaded.manifest.get("data") or {}, run.data.fingerprint)
    keep_order(loaded.manifest, run.recipe, run.data)
    run.engine.ledger.check_saved(state.rates)
    run.step = state.step
    run.engine_state.load(loaded.reader, state.updates or 0, _ticking(run))
    run.faults.load(state.faults)
    tensors = loaded.rank_tensors(groups.rank())
    if tensors:
        device.set_rng_state(tensors)
    if state.samples not in (None, run.plan.samples(run.step)):
        raise UserError(
            f"the checkpoint has consumed {state.samples} samples, this recipe's batches make it "
            f"{run.plan.samples(run.step)} at step {run.step}",
            where="training.global_batch_size",
            fix="set the batch sizes back",
        )


def _ticking(run: Run) -> Callable[[str], None]:
    return lambda name: run.watchdog.tick(f"loading {name}")


def _say(text: str) -> None:
    if groups.rank() == 0:
        print(text, flush=True)
