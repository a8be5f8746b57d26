"""A folder that belongs to one job: what the job is stands in its plan, and another job is refused."""

from __future__ import annotations

import contextlib
import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import PARTIAL_SUFFIX, fsync_directory

PLAN = "plan.json"


def claim(output: Path, plan: Mapping[str, Any], taken: str) -> None:
    """Make `output` the folder of what `plan` describes, or see that it is, so that an earlier start can be gone on.

    Any number of processes may claim the same folder for the same plan at the same time.

    Raises:
        UserError: it is something else's (`taken` says of what), or cannot be written.
    """
    path, wanted = output / PLAN, json.loads(json.dumps(plan))
    if not path.is_file():
        _make(output, path, wanted)
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError("cannot be read as JSON", where=str(path), fix="give another --output, or remove it") from None
    if found != wanted:
        raise UserError(taken, where=str(output), fix="give another --output, or remove it")


def _make(output: Path, path: Path, plan: Any) -> None:
    in_the_way = output.exists() and (not output.is_dir() or any(not _partial(entry) for entry in output.iterdir()))
    if in_the_way and not path.is_file():  # another process may have been the first since we looked
        raise UserError("the output exists already", where=str(output), fix="give another --output, or remove it")
    try:
        output.mkdir(parents=True, exist_ok=True)
        _create(path, (json.dumps(plan, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(output)) from None


def _partial(path: Path) -> bool:
    """Whether it is a claim under way, or one that was killed."""
    return path.name.startswith(PLAN) and path.name.endswith(PARTIAL_SUFFIX)


def _create(path: Path, content: bytes) -> None:
    """Write a file that is not there yet; where another process is the first, its file stays."""
    own = path.with_name(f"{path.name}.{uuid.uuid4().hex}{PARTIAL_SUFFIX}")
    try:
        with open(own, "wb") as handle:
            handle.write(content)
            handle.flush()
            os.fsync(handle.fileno())
        try:
            os.link(own, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links: of two at once the last one's plan stays
            os.replace(own, path)
        fsync_directory(path.parent)
    finally:
        with contextlib.suppress(OSError):
            own.unlink()
