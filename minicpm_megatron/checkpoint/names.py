"""Names of folders below a run's checkpoints/, and what each means.

step-N             a published checkpoint (if it has a manifest)
step-N.tmp         a save under way, or one that was killed
step-N.replaced    the checkpoint of the same step that a save is replacing
step-N.deleting    a checkpoint that retention is removing
step-N.corrupt     a checkpoint that failed verification, kept for the user to look at
.lock              held by the run that writes here (`storage.lock`)
latest             a hint for people: the name of the newest; nothing reads it
"""

from __future__ import annotations

import re
from pathlib import Path

LATEST = "latest"
TEMPORARY = ".tmp"
REPLACED = ".replaced"
DELETING = ".deleting"
CORRUPT = ".corrupt"
_STEP = re.compile(r"step-(\d{1,18})", re.ASCII)
_SET_ASIDE = re.compile(rf"step-(\d{{1,18}}){re.escape(CORRUPT)}(-\d+)?", re.ASCII)


def step_folder(directory: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return directory / f"step-{step}"


def published_steps(directory: Path) -> list[int]:
    """Steps that have a folder of their own, in order."""
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match and match[1] == str(int(match[1])))


def is_step_with(suffix: str, path: Path) -> bool:
    """Whether `path` is a folder named step-N + `suffix`, ours to rename or remove."""
    return path.name.endswith(suffix) and bool(_STEP.fullmatch(path.name.removesuffix(suffix))) and path.is_dir()


def steps_set_aside(directory: Path) -> list[int]:
    """Steps of which a damaged checkpoint was set aside, in order."""
    if not directory.is_dir():
        return []
    matches = (_SET_ASIDE.fullmatch(path.name) for path in directory.iterdir())
    return sorted(int(match[1]) for match in matches if match)
