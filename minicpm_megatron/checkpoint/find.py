"""Finding a checkpoint to go on from. Manifests and checksums are believed, the hint `latest` is not."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from minicpm_megatron.checkpoint.names import (
    CORRUPT,
    DELETING,
    LATEST,
    REPLACED,
    TEMPORARY,
    is_step_with,
    published_steps,
    step_folder,
    steps_set_aside,
)
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import RunRecipe
from minicpm_megatron.storage.atomic import PARTIAL_SUFFIX
from minicpm_megatron.storage.manifest import Unreadable, problems, read_manifest

log = logging.getLogger(__name__)
CHECKPOINTS = "checkpoints"


def newest_valid(
    directory: Path,
    on_corrupt: Literal["stop", "previous"],
    problems: Callable[[Path], list[str]] = problems,
) -> Path | None:
    """The newest checkpoint whose every byte is what was written, or None where there never was one.

    `problems` verifies a folder, as `manifest.problems` does.

    A checkpoint that fails is renamed to step-N.corrupt and named in the log; one that the disk fails to read keeps
    its name, because it may be whole.

    Raises:
        UserError: the newest fails and on_corrupt is "stop", in this start or an earlier one (a scheduler that starts
            the job again decides nothing), or none of those that exist is valid. A run is never started from scratch
            beside checkpoints that cannot be read.
    """
    steps = published_steps(directory)
    corrupt = sorted(path.name for path in directory.glob(f"*{CORRUPT}*")) if directory.is_dir() else []
    for step in reversed(steps):
        damaged = max(steps_set_aside(directory), default=-1)
        if on_corrupt == "stop" and damaged > step:
            raise UserError(
                f"a checkpoint newer than step {step} is damaged: step-{damaged}{CORRUPT}",
                where=str(directory),
                fix=f"restore it from a copy, or allow to go on from step {step} with checkpoint.on_corrupt=previous",
            )
        folder = step_folder(directory, step)
        try:
            found = problems(folder) or _misplaced(folder, step)
        except Unreadable as error:
            if on_corrupt == "stop":
                raise
            log.error("checkpoint %s is left out: %s", folder, error)
            corrupt.append(folder.name)
            continue
        if not found:
            return folder
        log.error("checkpoint %s is damaged: %s", folder, found[0])
        aside = _set_aside(folder)
        corrupt.append(aside.name)
        if on_corrupt == "stop":
            raise UserError(
                f"the newest checkpoint is damaged ({found[0]}); kept as {aside.name}",
                where=str(directory),
                fix="restore it from a copy, or allow to go on from the one before with checkpoint.on_corrupt=previous",
            )
    if corrupt:
        raise UserError(
            f"no checkpoint is valid; damaged: {', '.join(corrupt)}",
            where=str(directory),
            fix="restore one from a copy, or start a run of another name",
        )
    return None


def _misplaced(folder: Path, step: int) -> list[str]:
    """A checkpoint under another step's name would make the run do steps twice, or not at all."""
    inside = read_manifest(folder)["step"]
    return [] if inside == step else [f"{folder} holds the checkpoint of step {inside}"]


def _set_aside(folder: Path) -> Path:
    """Rename a damaged checkpoint; where that fails it keeps its name, and its damage is found again next time."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}{CORRUPT}{'' if number == 1 else f'-{number}'}")).exists():
        number += 1
    try:
        os.rename(folder, aside)
    except OSError as error:
        log.error("%s could not be renamed: %s", folder, error.strerror)
        return folder
    return aside


def clean_leftovers(directory: Path) -> None:
    """Finish what a killed process left: bring a replaced checkpoint back, remove the rest."""
    if not directory.is_dir():
        return
    directory.joinpath(LATEST + PARTIAL_SUFFIX).unlink(missing_ok=True)
    for path in list(directory.iterdir()):
        if is_step_with(REPLACED, path):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if final.exists():
                shutil.rmtree(path)
            else:
                os.rename(path, final)
    for path in list(directory.iterdir()):
        if is_step_with(TEMPORARY, path) or is_step_with(DELETING, path):
            shutil.rmtree(path)


def resolve_reference(reference: str, runs: Path) -> Path:
    """RUN@STEP -> the checkpoint's folder.

    Args:
        reference: RUN is a run's folder, or its name below `runs` or ./runs; STEP a number or "latest".

    Raises:
        UserError: there is no such run or no such checkpoint, naming those there are.
    """
    run, at, step = reference.rpartition("@")
    if not at or not run or not (step == "latest" or step.isdecimal() and len(step) < 19):
        raise UserError("not of the form RUN@STEP", where=reference, fix="for instance quickstart@300 or RUN@latest")
    places = (Path(run), runs / run, Path(RunRecipe().directory) / run)
    folder = next((path for path in places if (path / CHECKPOINTS).is_dir()), None)
    if folder is None:
        raise UserError(f"no run {run!r} with checkpoints, here or in {runs}", where=reference, fix="check the name")
    steps = published_steps(folder / CHECKPOINTS)
    wanted = steps[-1] if step == "latest" and steps else int(step) if step.isdecimal() else -1
    if wanted not in steps:
        raise UserError(
            f"{folder} has no checkpoint at step {step}",
            where=reference,
            fix=f"choose one of: {', '.join(map(str, steps)) or 'none yet'}",
        )
    return step_folder(folder / CHECKPOINTS, wanted)


def newest_checkpoint(path: Path) -> Path:
    """The checkpoint meant by a path: itself, or the newest of a run's folder.

    Raises:
        UserError: neither.
    """
    if (path / CHECKPOINTS).is_dir():
        return resolve_reference(f"{path}@latest", path.parent)
    return path


def find_source(text: str) -> Path:
    """The checkpoint or published folder meant by a path, a run (its newest checkpoint) or RUN@STEP.

    Raises:
        UserError: a run has no such checkpoint. Whether a folder holds a model is not looked at.
    """
    if not Path(text).exists() and "@" in text:
        return resolve_reference(text, Path(RunRecipe().directory))
    return newest_checkpoint(Path(text))
