"""Which checkpoints stay: the newest few; every m-th, and those named, for ever."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path

from minicpm_megatron.checkpoint.names import DELETING, published_steps, step_folder
from minicpm_megatron.storage.manifest import MANIFEST


def retain(
    directory: Path, *, keep_last: int, keep_every: int | None, verified: int, keep_steps: Collection[int] = ()
) -> list[int]:
    """Remove what need not be kept; returns the steps removed.

    A folder is renamed before anything in it is deleted, so that what has a checkpoint's name is whole. The step
    `verified`, the newest known to be good, always stays. A folder without a manifest is neither counted nor touched.
    """
    steps = [step for step in published_steps(directory) if (step_folder(directory, step) / MANIFEST).is_file()]
    newest = set(steps[-keep_last:])
    removed = []
    for step in steps:
        if step in newest or step == verified or step in keep_steps or (keep_every and step % keep_every == 0):
            continue
        folder = step_folder(directory, step)
        doomed = folder.with_name(folder.name + DELETING)
        os.rename(folder, doomed)
        shutil.rmtree(doomed)
        removed.append(step)
    return removed
