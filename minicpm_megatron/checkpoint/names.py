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
_STEP = re.compile(r"step-(\d{1,18})")


def step_folder(directory: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return directory / f"step-{step}"


def published_steps(directory: Path) -> list[int]:
    """Steps that have a folder of their own, in order."""
    if not directory.is_dir():
        return []
    matches = (_STEP.fullmatch(path.name) for path in directory.iterdir() if path.is_dir())
    return sorted(int(match[1]) for match in matches if match and match[1] == str(int(match[1])))
