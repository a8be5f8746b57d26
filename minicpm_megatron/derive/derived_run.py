"""A run whose first checkpoint is a checkpoint of another run, or a published model, rewritten tensor by tensor.

The new run stands where the old one stood: step, samples, tokens, optimizer state, random state and schedule are
carried over, and RUN/recipe.yaml is the old run's recipe with the new model. Started with it, the trainer finds the
checkpoint as the run's own and goes on.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.checkpoint.names import step_folder
from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.convert.output_folder import atomic_folder, check_space
from minicpm_megatron.convert.rewriting import Rewrite, bytes_of, has_moments, write_rewritten
from minicpm_megatron.convert.source import Source
from minicpm_megatron.derive.moved_run import move_paths
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.mup import rates_with_roles
from minicpm_megatron.recipe import BatchPlan, ModelRecipe, Recipe, build, build_saved, dump_recipe, recipe_hash
from minicpm_megatron.recipe.dump import RECIPE
from minicpm_megatron.recipe.load import apply_override
from minicpm_megatron.registry import OPTIMIZERS
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.storage.manifest import MANIFEST, TOKENIZER_SHA256
from minicpm_megatron.storage.sharded import CheckpointReader
from minicpm_megatron.training.run_data import MIXTURE
from minicpm_megatron.training.start import check_same_past

_SMALL_FILES = 1 << 20


@dataclass(frozen=True)
class DerivedRun:
    """What was made.

    Attributes:
        run: its folder.
        step: steps done.
        model: what it trains.
        has_moments: whether optimizer state was carried over.
        recipe: that was written to RUN/recipe.yaml; None where none was.
        notes: things worth knowing that are no errors, one line each.
    """

    run: Path
    step: int
    model: ModelRecipe
    has_moments: bool
    recipe: Recipe | None
    notes: tuple[str, ...] = ()

    @property
    def has_recipe(self) -> bool:
        """Return whether the command wrote RUN/recipe.yaml."""
        return self.recipe is not None

    def how_to_go_on(self) -> str:
        """One line for the user."""
        if self.recipe is None:
            return f"go on with a recipe of this model whose run is {self.run} (name and run.directory)"
        command = f"examples/train.py --recipe {self.run / RECIPE}"
        if self.step < BatchPlan(self.recipe).total_steps():
            return f"go on with: {command} [section.key=value ...]"
        ended = f"its schedule has ended at step {self.step}"
        if _can_be_longer(self.recipe, self.step):
            return f"{ended}; go on with: {command} schedule.total=MORE [section.key=value ...]"
        # a longer one would have given the steps of the decay other learning rates
        return (
            f"{ended} and cannot be made longer; begin a stage with its weights and moments: {command}"
            f" --init-from {self.run}@{self.step} name=NEW [section.key=value ...]"
        )


def _can_be_longer(recipe: Recipe, step: int) -> bool:
    """Return whether a later end of the schedule keeps the learning rates of the `step` steps already done."""
    fields = recipe.model_dump(mode="json")
    fields["schedule"]["total"] *= 2
    try:
        check_same_past(recipe, build(fields), step)
    except UserError:
        return False
    return True


def check_new_run(run: Path) -> None:
    """Raise UserError where there is something already."""
    if run.exists():
        raise UserError("exists already", where=str(run), fix="give another --output")


def derived_recipe(source: Source, model: ModelRecipe, run: Path, overrides: Sequence[str] = ()) -> Recipe | None:
    """The recipe of `run`, which goes on with `model` made of `source`; None where no run saved the source.

    Args:
        overrides: section.key=value.

    Raises:
        UserError: an override that is malformed, that is given without a recipe to change, or that would have made
            the steps already done others.
    """
    manifest = _manifest(source)
    if "recipe" not in manifest:
        if overrides:
            raise UserError("the model was not saved by a run, so there is no recipe to change", where=overrides[0])
        return None
    old = build_saved(manifest["recipe"])
    fields = old.model_dump(mode="json")
    fields |= {"name": run.name, "preset": None, "model": model.model_dump(mode="json")}
    fields["run"]["directory"] = str(run.parent)
    for override in overrides:
        apply_override(fields, override)
    recipe = build(fields)
    if recipe.run_directory != run:
        raise UserError(f"would make the run {recipe.run_directory}, not {run}", where="override", fix="give --output")
    check_same_past(old.model_copy(update={"model": recipe.model}), recipe, _state_of(source).step)
    return recipe


def write_run(
    source: Source,
    run: Path,
    model: ModelRecipe,
    recipe: Recipe | None,
    rewrite: Rewrite,
    *,
    how: dict[str, Any],
    new_roles: Collection[str],
    progress: bool,
) -> DerivedRun:
    """Make `run`, whole or not at all.

    Args:
        source: a checkpoint of ours, of any layout, or a published folder.
        model: what the new run trains; `recipe`'s where there is one.
        recipe: of `derived_recipe`.
        rewrite: makes the tensors of `model` from those of the source.
        how: facts for `RunState.origin`, beside the source's run and step.
        new_roles: muP groups that the source has no saved rate of.
        progress: show bytes, rate and remaining time on standard error.

    Raises:
        UserError: the source has optimizer state that only a conversion to our format takes over, the place cannot be
            written, or has too little room.
    """
    if source.optimizer:
        raise UserError(
            "the optimizer state would be left behind",
            where=str(source.folder),
            fix="make a checkpoint of ours of it first: minicpm convert --to megatron",
        )
    manifest = _manifest(source)
    step = _state_of(source).step
    carried = {key: manifest[key] for key in ("data", MIXTURE, TOKENIZER_SHA256) if key in manifest}
    facts = carried | {"model": model.model_dump(mode="json")}
    if recipe:
        facts |= {"recipe": recipe.model_dump(mode="json"), "recipe_hash": recipe_hash(recipe)}
    amount = bytes_of(source, model)
    check_space(run, amount + _SMALL_FILES)
    with atomic_folder(run, needed=amount + _SMALL_FILES) as partial:
        write_rewritten(
            step_folder(partial / CHECKPOINTS, step),
            source,
            rewrite,
            state=_state(source, recipe, new_roles, _origin(source, step) | how).to_json(),
            facts=facts,
            total_bytes=amount,
            progress=progress,
        )
        if recipe:
            write_bytes(partial / RECIPE, dump_recipe(recipe).encode())
    notes = (*source.notes, *source.left_behind)
    return DerivedRun(run, step, model, has_moments(source), recipe, notes)


def _manifest(source: Source) -> dict[str, Any]:
    """The manifest of a checkpoint of ours, with the paths of its run as that lies now; empty for other sources."""
    if not isinstance(source.tensors, CheckpointReader):
        return {}
    manifest, folder = source.tensors.manifest, source.folder.resolve()
    if "recipe" not in manifest or folder.parent.name != CHECKPOINTS:
        return manifest
    manifest = copy.deepcopy(manifest)
    before = build_saved(manifest["recipe"]).run_directory
    moved = move_paths(manifest["recipe"], before, folder.parent.parent)
    if "data" in manifest:
        manifest["data"] = {moved.get(prefix, prefix): content for prefix, content in manifest["data"].items()}
    return manifest


def _origin(source: Source, step: int) -> dict[str, Any]:
    folder = source.folder.resolve()
    of_a_run = folder.parent.name == CHECKPOINTS
    return {"run": str(folder.parent.parent if of_a_run else folder), "step": step}


def _state(source: Source, recipe: Recipe | None, new_roles: Collection[str], origin: dict[str, Any]) -> RunState:
    """Where the new run stands: where the old one stood."""
    before = _state_of(source)
    lr_rules = OPTIMIZERS.get(recipe.optimizer.name).lr_rules if recipe else {}
    return RunState(
        step=before.step,
        samples=before.samples,
        tokens=before.tokens or 0,
        updates=before.updates,
        origin=origin,
        text=source.text.state(),
        rates=rates_with_roles(before.rates, new_roles, source.model, lr_rules),
        # the first thing a run says is then what the new model is worth before any step of its own
        evaluation_due=bool(recipe and recipe.evaluation.interval),
        faults=before.faults,
        tokenizer=str(source.tokenizer.resolve()) if source.tokenizer else None,
    )


def _state_of(source: Source) -> RunState:
    """Where the run of a checkpoint of ours stood; other sources have done no step."""
    manifest = _manifest(source)
    return RunState.of(manifest, str(source.folder / MANIFEST)) if manifest else RunState(step=0)
