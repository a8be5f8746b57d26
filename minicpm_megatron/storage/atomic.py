"""Files that are either whole or absent: write to a temporary name, fsync, rename, fsync the folder."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

PARTIAL_SUFFIX = ".part"


def fsync_directory(directory: Path) -> None:
    """Make a rename or an unlink inside `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for binary writing so that it appears only when the block ends without an error.

    The bytes go to `path` + ".part"; on success they are fsynced and renamed over `path`, on any
    exception the partial file is removed and whatever stood at `path` before is untouched.
    """
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(partial, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        fsync_directory(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` by `content` atomically and durably."""
    with atomic_file(path) as handle:
        handle.write(content)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` by `value` as indented, key-ordered UTF-8 JSON, atomically and durably."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode())
