"""Where a run starts: from nothing, from its own newest checkpoint, or as a branch of another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.checkpoint.find import resolve_reference
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import BatchPlan, Recipe, build

# sections that decide what the steps already done were; everything else may change between two starts of a run
PAST = ("model", "data.sequence_length", "data.train", "training.seed", "training.precision", "optimizer")


@dataclass(frozen=True)
class Start:
    """A run's first step.

    Attributes:
        step: steps already done.
        checkpoint: folder to load, or None for new weights.
        origin: {"run", "step"} of the trunk where this is a branch.
    """

    step: int
    checkpoint: Path | None
    origin: dict[str, Any] | None = None


def branch_recipe(recipe: Recipe, reference: str) -> tuple[Recipe, Path, int]:
    """The recipe of a decay that starts at a stable checkpoint of another run.

    Args:
        recipe: what the user asked for; its schedule's decay, shape and half-life describe the branch.
        reference: RUN@STEP, RUN a run's folder or its name below run.directory.

    Returns:
        The recipe with its schedule moved so that the decay starts at the checkpoint, the checkpoint's folder and
        its step.

    Raises:
        UserError: no such checkpoint, a checkpoint that is not in the stable stage, a recipe that would have given
            other steps so far, or the same run.
    """
    from minicpm_megatron.storage.manifest import read_manifest

    folder = resolve_reference(reference, Path(recipe.run.directory))
    manifest = read_manifest(folder)
    step = int(manifest["step"])
    trunk = build(manifest["recipe"])
    if folder.parent.parent.resolve() == recipe.run_directory.resolve():
        raise UserError(
            "a branch cannot write into its own trunk", where=f"--from {reference}", fix="give it a name: name=NAME"
        )
    if recipe.schedule.shape != "wsd" or not recipe.schedule.decay:
        raise UserError("a branch needs a decay", where="schedule.decay", fix="give shape wsd and a decay length")
    plan = BatchPlan(trunk)
    position = step if trunk.schedule.unit == "steps" else plan.tokens(step)
    if trunk.schedule.unit != recipe.schedule.unit:
        raise UserError(
            f"the trunk counts {trunk.schedule.unit}", where="schedule.unit", fix=f"use {trunk.schedule.unit}"
        )
    if position < trunk.schedule.warmup or build_schedule(trunk.schedule).factor(position) != 1.0:
        raise UserError(
            f"step {step} is not in the stable stage of its run",
            where=f"--from {reference}",
            fix="choose a checkpoint after the warmup and before the decay",
        )
    fields = recipe.model_dump(mode="json")
    fields["schedule"] |= {"total": position + recipe.schedule.decay, "warmup": trunk.schedule.warmup}
    # the trunk's batches decide which samples it has seen
    fields["training"]["batch_growth"] = trunk.model_dump(mode="json")["training"]["batch_growth"]
    fields["training"]["global_batch_size"] = trunk.training.global_batch_size
    branch = build(fields)
    check_same_past(trunk, branch, step, changed_data=True)
    return branch, folder, step


def check_same_past(before: Recipe, now: Recipe, step: int, *, changed_data: bool = False) -> None:
    """Refuse a recipe under which the `step` steps already done would have been others.

    Layout, ZeRO stage, logging, evaluation and the future of the schedule may change.

    Args:
        changed_data: a decay stage may read other data than the trunk did (section 5 of the paper).

    Raises:
        UserError: naming the first key that differs.
    """
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for dotted in PAST:
        if changed_data and dotted == "data.train":
            continue
        first, second = _get(old, dotted), _get(new, dotted)
        if first != second:
            key, was, wanted = _first_difference(dotted, first, second)
            raise UserError(
                f"was {was!r} in the {step} steps already done, and is {wanted!r} now",
                where=key,
                fix="set it back, or start a run of another name",
            )
    plans, schedules = (
        (BatchPlan(before), BatchPlan(now)),
        (build_schedule(before.schedule), build_schedule(now.schedule)),
    )
    for done in range(step):
        if plans[0].samples(done + 1) != plans[1].samples(done + 1):
            raise UserError(
                f"would have made step {done + 1} read other samples",
                where="training.global_batch_size or training.batch_growth",
                fix="set it back, or start a run of another name",
            )
        factors = [schedule.factor(plan.position(done)) for schedule, plan in zip(schedules, plans, strict=True)]
        if factors[0] != factors[1]:
            raise UserError(
                f"would have given step {done + 1} the rate factor {factors[1]:.6g} and not {factors[0]:.6g}",
                where="schedule",
                fix="branch instead: --from RUN@STEP name=NEW, or set the schedule back",
            )


def _get(fields: dict[str, Any], dotted: str) -> Any:
    value: Any = fields
    for key in dotted.split("."):
        value = value[key]
    return value


def _first_difference(path: str, first: Any, second: Any) -> tuple[str, Any, Any]:
    if isinstance(first, dict) and isinstance(second, dict):
        for key in first:
            if first[key] != second.get(key):
                return _first_difference(f"{path}.{key}", first[key], second.get(key))
    return path, first, second
