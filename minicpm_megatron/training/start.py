"""Where a run starts: from nothing, from its own newest checkpoint, or as a branch of another run."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minicpm_megatron.checkpoint.find import CHECKPOINTS, resolve_reference
from minicpm_megatron.checkpoint.names import published_steps, step_folder, steps_set_aside
from minicpm_megatron.checkpoint.run_state import Parent, RunState
from minicpm_megatron.errors import UserError, require
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import BatchPlan, ModelRecipe, Recipe, build, build_saved, build_section
from minicpm_megatron.storage.manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from minicpm_megatron.engine.state import ShardReader

# sections that decide what the steps already done were; everything else may change between two starts of a run
PAST = (
    "model",
    "data.sequence_length",
    "data.reset_attention_mask",
    "data.train",
    "training.seed",
    "training.precision",
    "training.gradient_clipping",
    "training.z_loss_coeff",
    "training.objective",
    "optimizer",
)


# what a new stage may change about a model whose weights it takes over: no tensor depends on them
ADAPTABLE = (
    "max_position_embeddings",
    "rotary_base",
    "rope_scaling",
    "moe_aux_loss_coeff",
    "moe_z_loss_coeff",
    "moe_router_load_balancing_type",
)


# what decides how weights begin or how they are trained, and so nothing about weights that are there
INITIAL = ("init_method_std", "embedding_role")


class Published(NamedTuple):
    """A model in a folder that is no checkpoint of ours.

    Attributes:
        weights: its tensors; there are no moments.
        text: its end tokens and settings for generation, as `RunState.text` has them.
    """

    model: ModelRecipe
    weights: ShardReader
    text: dict[str, Any]


class Origin(NamedTuple):
    """A checkpoint of another run, or a published folder, that a run starts from.

    Attributes:
        folder, step: the checkpoint; or the published folder, and 0.
        reference: what the user called it.
        goes_on: the run is a branch, whose steps go on from the checkpoint's; else one of its own from step 0, with
            the checkpoint's weights and Adam's moments.
        published: opens the folder that is no checkpoint of ours; None: it is one.
    """

    folder: Path
    step: int
    reference: str
    goes_on: bool
    published: Callable[[], Published] | None = None


def initial_weights(recipe: Recipe, reference: str, open_folder: Callable[[Path], Published]) -> Origin:
    """Where a run of its own takes its weights and moments from, to go on with other data, lengths, RoPE or schedule.

    Args:
        reference: RUN@STEP, as for `branch_recipe`; or a Hugging Face folder, which has weights alone.
        open_folder: opens such a folder.

    Raises:
        UserError: no such checkpoint or folder, one of another model (but for `ADAPTABLE`) or another optimizer, or the
            run has checkpoints already and did not begin so.
    """
    if Path(reference).is_dir() or "@" not in reference:
        published = functools.cache(lambda: _open_same_model(recipe.model, reference, open_folder))
        given = Path(reference).resolve()
        checkpoints = recipe.run_directory / CHECKPOINTS
        _started(recipe, f"{given}@0")  # refuses a run that began otherwise
        # with checkpoints a run needs the folder no more, and it may be gone; damaged ones are the start's to name
        if not published_steps(checkpoints) and not steps_set_aside(checkpoints):
            published()
        return Origin(given, 0, reference, False, published)
    started = _started(recipe, reference)
    if started is not None:
        run, step = started.parent
        return Origin(step_folder(run / CHECKPOINTS, step), step, reference, False)
    folder = resolve_reference(reference, Path(recipe.run.directory))
    manifest = read_manifest(folder)
    # a checkpoint from before a key existed has its default
    saved = build_section(ModelRecipe, manifest.get("model"), where=reference)
    key = changed_key(saved, recipe.model, free=ADAPTABLE)
    if key is not None:
        raise UserError(
            f"is {getattr(recipe.model, key)!r}, and {getattr(saved, key)!r} in {reference}",
            where=f"model.{key}",
            fix="a stage can change RoPE, lengths and weights of auxiliary losses; minicpm upcycle and"
            " minicpm convert --untie do more",
        )
    _check_optimizer(recipe, manifest.get("recipe"), reference)
    return Origin(folder, int(manifest["step"]), reference, False)


def _check_optimizer(recipe: Recipe, saved: Mapping[str, Any] | None, reference: str) -> None:
    """Refuse a checkpoint whose moments are those of another optimizer.

    Args:
        saved: the recipe in the checkpoint's manifest; None: the checkpoint was converted, and has none.
    """
    if saved is None:
        return
    # the key is younger than AdamW
    was, wanted = (saved.get("optimizer") or {}).get("name", "adamw"), recipe.optimizer.name
    require(
        was == wanted,
        "optimizer.name",
        f"{reference} was trained with {was}, whose moments {wanted} has no use for",
        f"set it to {was}, or export the weights and start with the exported folder",
    )


def _open_same_model(asked: ModelRecipe, reference: str, open_folder: Callable[[Path], Published]) -> Published:
    """Open a published folder, and refuse a model that is not the recipe's, with everything that makes it so."""
    require(
        Path(reference).is_dir(),
        where=reference,
        what="no such folder, and not of the form RUN@STEP",
        fix="give a Hugging Face folder, or for instance quickstart@300",
    )
    published = open_folder(Path(reference))
    found, free = published.model, (*ADAPTABLE, *INITIAL)
    keys = [key for key in ModelRecipe.model_fields if key not in free and getattr(found, key) != getattr(asked, key)]
    if keys:
        raise UserError(
            f"is another model than the one in {reference}: "
            + ", ".join(f"{key} is {_yaml(getattr(asked, key))}" for key in keys),
            where="model",
            fix="give " + " ".join(f"model.{key}={_yaml(getattr(found, key))}" for key in keys),
        )
    return published


def _yaml(value: Any) -> str:
    return json.dumps(value)


def changed_key(before: ModelRecipe, now: ModelRecipe, *, free: Collection[str]) -> str | None:
    """The first field that differs, those that are `free` to left out; None where there is none."""
    fields = (key for key in ModelRecipe.model_fields if key not in free)
    return next((key for key in fields if getattr(before, key) != getattr(now, key)), None)


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
            other steps so far, or a name under which there is another run, the trunk itself for one.
    """
    if not recipe.schedule.decay:
        fix = "give the trunk's shape, wsd for a constant trunk, and a decay length"
        raise UserError("a branch needs a decay", where="schedule.decay", fix=fix)
    started = _started_branch(recipe, reference)
    if started is not None:
        return started
    folder = resolve_reference(reference, Path(recipe.run.directory))
    manifest = read_manifest(folder)
    if "recipe" not in manifest:
        raise UserError("was not saved by a run", where=f"--from {reference}", fix="choose a checkpoint of a run")
    step, trunk = int(manifest["step"]), build_saved(manifest["recipe"])
    _check_stable(trunk, step, reference)
    branch = _branch_of(recipe, trunk, step)
    check_same_past(trunk, branch, step, changed_data=True)
    return branch, folder, step


def _started_branch(recipe: Recipe, reference: str) -> tuple[Recipe, Path, int] | None:
    """The branch as its own newest checkpoint has it, or None where it has none yet.

    The trunk may have gone on since: its "latest" may be another, and retention may have removed the checkpoint that
    the branch began with.
    """
    started = _started(recipe, reference)
    if started is None:
        return None
    run, step = started.parent
    return _branch_of(recipe, build_saved(started.recipe), step), step_folder(run / CHECKPOINTS, step), step


class _Started(NamedTuple):
    """What a run's newest readable checkpoint says of its beginning, and its recipe."""

    parent: Parent
    recipe: dict[str, Any]


def _started(recipe: Recipe, reference: str) -> _Started | None:
    """How the run itself says that it began; None where it has no checkpoint yet.

    Raises:
        UserError: it began from something else.
    """
    directory = recipe.run_directory / CHECKPOINTS
    run, _, asked = reference.rpartition("@")
    for step in reversed(published_steps(directory)):
        folder = step_folder(directory, step)
        try:
            manifest = read_manifest(folder)
            parent = RunState.of(manifest, str(folder / MANIFEST)).parent
        except UserError:  # for the verification at the start to name and set aside
            continue
        if parent is None or parent.run.name != Path(run).name or asked not in ("latest", str(parent.step)):
            kind = "a run of its own" if parent is None else f"from {parent.run}@{parent.step}"
            raise UserError(
                f"has checkpoints already, and is {kind}",
                where=str(recipe.run_directory),
                fix="give the new run another name: name=NAME",
            )
        return _Started(parent, manifest["recipe"])
    return None


def _check_stable(trunk: Recipe, step: int, reference: str) -> None:
    plan = BatchPlan(trunk)
    position = step if trunk.schedule.unit == "steps" else plan.tokens(step)
    stage = build_schedule(trunk).stable_stage
    if stage is None or not stage[0] <= position <= stage[1]:
        raise UserError(
            f"step {step} is not in the stable stage of its run",
            where=f"--from {reference}",
            fix="choose a checkpoint after the warmup and before the decay",
        )


def _branch_of(recipe: Recipe, trunk: Recipe, step: int) -> Recipe:
    """`recipe` with its decay moved to `step`, and with the trunk's warmup and batches."""
    plan = BatchPlan(trunk)
    position = step if trunk.schedule.unit == "steps" else plan.tokens(step)
    if trunk.schedule.unit != recipe.schedule.unit:
        raise UserError(
            f"the trunk counts {trunk.schedule.unit}", where="schedule.unit", fix=f"use {trunk.schedule.unit}"
        )
    fields = recipe.model_dump(mode="json")
    fields["schedule"] |= {"total": position + (recipe.schedule.decay or 0), "warmup": trunk.schedule.warmup}
    # the trunk's batches decide which samples it has seen
    fields["training"]["batch_growth"] = trunk.model_dump(mode="json")["training"]["batch_growth"]
    fields["training"]["global_batch_size"] = trunk.training.global_batch_size
    return build(fields)


def check_same_past(
    before: Recipe,
    now: Recipe,
    step: int,
    *,
    changed_data: bool = False,
    data: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {}),
) -> None:
    """Refuse a recipe under which the `step` steps already done would have been others.

    Layout, ZeRO stage, logging, evaluation and the future of the schedule may change, but not end before `step`.

    Args:
        changed_data: a decay stage may read other data than the trunk did (section 5 of the paper).
        data: prefix -> fingerprint, of `before` and of `now`: equal data may lie under another path.

    Raises:
        UserError: naming the first key that differs.
    """
    old, new = before.model_dump(mode="json"), now.model_dump(mode="json")
    for dotted in PAST:
        if changed_data and dotted == "data.train":
            continue
        first, second = _get(old, dotted), _get(new, dotted)
        if dotted == "data.train":
            second = _under_old_paths(first, second, *data)
        if first != second:
            key, was, wanted = _first_difference(dotted, first, second)
            raise UserError(
                f"was {was!r} in the {step} steps already done, and is {wanted!r} now",
                where=key,
                fix="set it back, or start a run of another name",
            )
    ends = {"schedule.total": BatchPlan(now).total_steps(), "training.stop_after": now.training.stop_after}
    for key, end in ends.items():
        require(
            end is None or end >= step,
            key,
            f"ends the run after step {end}, and {step} steps are already done",
            "give a later end, or start a run of another name",
        )
    plans, schedules = (
        (BatchPlan(before), BatchPlan(now)),
        (build_schedule(before), build_schedule(now)),
    )
    for done in range(step):
        if plans[0].samples(done + 1) != plans[1].samples(done + 1):
            raise UserError(
                f"would have made step {done + 1} read other samples",
                where="training.global_batch_size or training.batch_growth",
                fix="set it back, or start a run of another name",
            )
        factors = [schedule.factor(plan.position(done)) for schedule, plan in zip(schedules, plans, strict=True)]
        lengths = [plan.row_length(done) for plan in plans]
        if lengths[0] != lengths[1]:
            raise UserError(
                f"would have fed step {done + 1} rows of {lengths[1]} tokens and not of {lengths[0]}",
                where="data.curriculum",
                fix="set it back, or start a run of another name",
            )
        if factors[0] != factors[1]:
            raise UserError(
                f"would have given step {done + 1} the rate factor {factors[1]:.6g} and not {factors[0]:.6g}",
                where="schedule",
                fix="branch instead: --from RUN@STEP name=NEW, or set the schedule back",
            )


def check_resume(manifest: Mapping[str, Any], recipe: Recipe, fingerprint: Mapping[str, str]) -> None:
    """`check_same_past` between the recipe in a run's manifest and `recipe`; a manifest without one passes.

    Args:
        fingerprint: prefix -> fingerprint of the recipe's training data.
    """
    if "recipe" in manifest:
        data = (manifest.get("data") or {}, fingerprint)
        check_same_past(build_saved(manifest["recipe"]), recipe, int(manifest["step"]), data=data)


def _under_old_paths(
    before: list[dict[str, Any]], now: list[dict[str, Any]], saved: Mapping[str, str], found: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The sources of `now`, those with the content of the source in the same place before under its prefix."""
    same = [saved.get(old["prefix"], "") == found.get(new["prefix"]) for old, new in zip(before, now, strict=False)]
    same += [False] * (len(now) - len(same))
    return [new | {"prefix": before[place]["prefix"]} if same[place] else new for place, new in enumerate(now)]


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
