"""What tools/upcycle.py does: a run whose first checkpoint is the mixture made of a dense model.

The new run stands where the dense one stood: step, samples, tokens, optimizer state, random state and schedule are
carried over, and RUN/recipe.yaml is the dense run's recipe with the mixture for its model. Started with it, the trainer
finds the checkpoint as the run's own and goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.checkpoint.find import CHECKPOINTS, newest_checkpoint, resolve_reference
from minicpm_megatron.checkpoint.names import step_folder
from minicpm_megatron.convert import open_source
from minicpm_megatron.convert.output_folder import atomic_folder, check_space
from minicpm_megatron.convert.source import Source
from minicpm_megatron.convert.upcycling import bytes_of, has_moments, write_upcycled
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.upcycling import Upcycling, upcycled_model, upcycled_rates
from minicpm_megatron.recipe import ModelRecipe, Recipe, RunRecipe, build, dump_recipe, recipe_hash
from minicpm_megatron.recipe.load import apply_override
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.storage.sharded import CheckpointReader
from minicpm_megatron.training.start import check_same_past

MOMENTS = ("clone", "drop")
RECIPE = "recipe.yaml"
_SMALL_FILES = 1 << 20
# of the mixture; what else a model has is the dense one's or follows from the options
_FREE = (
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_router_pre_softmax",
    "moe_z_loss_coeff",
)


@dataclass(frozen=True)
class Upcycled:
    """What was made.

    Attributes:
        run: its folder.
        step: steps done.
        model: the mixture.
        has_moments: whether optimizer state was carried over.
        has_recipe: whether RUN/recipe.yaml was written.
    """

    run: Path
    step: int
    model: ModelRecipe
    has_moments: bool
    has_recipe: bool


def find_dense(text: str) -> Path:
    """The checkpoint or published folder meant by a path, a run (its newest checkpoint) or RUN@STEP.

    Raises:
        UserError: there is none.
    """
    if not Path(text).exists() and "@" in text:
        return resolve_reference(text, Path(RunRecipe().directory))
    return newest_checkpoint(Path(text))


def upcycle(
    dense: Path,
    run: Path,
    plan: Upcycling,
    *,
    moments: str = "clone",
    overrides: Sequence[str] = (),
    progress: bool = False,
) -> Upcycled:
    """Make `run` out of the dense model in `dense`, whole or not at all.

    Args:
        dense: a checkpoint of ours, of any layout, or a published folder.
        moments: what experts get of Adam's: "clone" the dense MLP's, "drop" zeros; see `upcycle_moment`.
        overrides: section.key=value for the new run's recipe.
        progress: show bytes, rate and remaining time on standard error.

    Raises:
        UserError: anything wrong with the input, the options or the place.
    """
    if moments not in MOMENTS:
        raise UserError(f"unknown choice {moments!r}", where="--moments", fix=f"use one of {', '.join(MOMENTS)}")
    source = open_source(dense)
    if source.model.num_moe_experts is not None:
        raise UserError(
            f"a mixture of {source.model.num_moe_experts} experts already", where=str(dense), fix="give a dense model"
        )
    model = upcycled_model(source.model, plan)
    if run.exists():
        raise UserError("exists already", where=str(run), fix="give another --output")
    manifest = source.tensors.manifest if isinstance(source.tensors, CheckpointReader) else {}
    before: dict[str, Any] = manifest.get("state", {})
    step = int(before.get("step", 0))
    recipe = _recipe(manifest, model, run, step, overrides)
    model = recipe.model if recipe else model
    facts = {key: manifest[key] for key in ("data",) if key in manifest} | {"model": model.model_dump(mode="json")}
    if recipe:
        facts |= {"recipe": recipe.model_dump(mode="json"), "recipe_hash": recipe_hash(recipe)}
    amount = bytes_of(source, model)
    check_space(run, amount + _SMALL_FILES)
    with atomic_folder(run, needed=amount + _SMALL_FILES) as partial:
        write_upcycled(
            step_folder(partial / CHECKPOINTS, step),
            source,
            plan,
            clone_moments=moments == "clone",
            state=_state(source, before, recipe, _origin(source, step, plan, moments)),
            facts=facts,
            total_bytes=amount,
            progress=progress,
        )
        if recipe:
            write_bytes(partial / RECIPE, dump_recipe(recipe).encode())
    return Upcycled(run, step, model, has_moments(source), recipe is not None)


def _recipe(
    manifest: dict[str, Any], model: ModelRecipe, run: Path, step: int, overrides: Sequence[str]
) -> Recipe | None:
    """The new run's recipe, or None where the dense model was not saved by a run."""
    if "recipe" not in manifest:
        if overrides:
            raise UserError(
                "the dense model was not saved by a run, so there is no recipe to change", where=overrides[0]
            )
        return None
    dense = build(manifest["recipe"])
    fields = dense.model_dump(mode="json")
    fields |= {"name": run.name, "preset": None, "model": model.model_dump(mode="json")}
    fields["run"]["directory"] = str(run.parent)
    for override in overrides:
        apply_override(fields, override)
    recipe = build(fields)
    if recipe.run_directory != run:
        raise UserError(f"would make the run {recipe.run_directory}, not {run}", where="override", fix="give --output")
    wanted, made = model.model_dump(), recipe.model.model_dump()
    for key in model.model_dump():
        if key not in _FREE and wanted[key] != made[key]:
            raise UserError(
                f"upcycling makes it {wanted[key]!r}, not {made[key]!r}",
                where=f"override model.{key}",
                fix="use --experts, --top-k and --granularity",
            )
    check_same_past(dense.model_copy(update={"model": recipe.model}), recipe, step)
    return recipe


def _origin(source: Source, step: int, plan: Upcycling, moments: str) -> dict[str, Any]:
    folder = source.folder.resolve()
    of_a_run = folder.parent.name == CHECKPOINTS
    return {
        "run": str(folder.parent.parent if of_a_run else folder),
        "step": step,
        "upcycling": {**plan.facts(), "moments": moments},
    }


def _state(source: Source, before: dict[str, Any], recipe: Recipe | None, origin: dict[str, Any]) -> dict[str, Any]:
    """Where the new run stands: where the dense one stood."""
    carried = {key: before[key] for key in ("samples", "updates", "faults") if key in before}
    return carried | {
        "step": int(before.get("step", 0)),
        "tokens": int(before.get("tokens", 0)),
        "rates": upcycled_rates(before.get("rates", {}), source.model),
        "origin": origin,
        "fault": None,
        # the first thing a run says is then what the mixture is worth before any step of its own
        "evaluation_due": bool(recipe and recipe.evaluation.interval),
        "data": {"tokenizer": str(source.tokenizer.resolve()) if source.tokenizer else None},
    }
