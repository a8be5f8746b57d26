"""manifest.json: what a checkpoint folder holds, with a checksum a file. A folder without one is no checkpoint.

The manifest carries a checksum of its own, so that a flipped bit in a step or a rate is found as one in a weight is.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.storage.checksum import FileRecord, content_sha256, file_sha256

MANIFEST = "manifest.json"
TOKENIZER_SHA256 = "tokenizer_sha256"
"""Key of a manifest: SHA-256 of the tokenizer's file that a run was started with; absent where it named none."""
CHECKSUM = "checksum"
FORMAT = "minicpm_megatron checkpoint 1"
LIBRARIES = ("minicpm_megatron", "torch", "deepspeed", "megatron-core", "numpy", "safetensors")


class Unreadable(UserError):
    """The disk failed a read. The file may well be whole: this is no verdict on the checkpoint."""


def write_manifest(folder: Path, files: list[FileRecord], *, state: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the manifest of `folder`: its files, the state of the run and facts about it (JSON values)."""
    content = {
        **facts,
        "format": FORMAT,
        "step": state["step"],
        "state": state,
        "files": [asdict(record) for record in files],
        "versions": library_versions(),
    }
    # as it will be read back: JSON turns the keys 2 and 10 into text, which sorts, and so hashes, differently
    content = json.loads(json.dumps(content))
    text = json.dumps(content | {CHECKSUM: content_sha256(content)}, indent=2, sort_keys=True)
    write_bytes(folder / MANIFEST, f"{text}\n".encode())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder.

    Raises:
        Unreadable: the disk fails.
        UserError: it is missing, damaged, not ours, or names a file outside the folder.
    """
    path = folder / MANIFEST
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError("there is no manifest, so this is no checkpoint", where=str(path)) from None
    except (IsADirectoryError, NotADirectoryError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read as JSON: {error}", where=str(path)) from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"not of the form {FORMAT!r}", where=str(path))
    if value.get(CHECKSUM) != content_sha256({key: entry for key, entry in value.items() if key != CHECKSUM}):
        raise UserError("the checksum is not that of what was written", where=str(path))
    for entry in _records(value, path):
        if entry.name != Path(entry.name).name or entry.name in ("", ".", ".."):
            raise UserError(f"names {entry.name!r}, which is not a file of this folder", where=str(path))
    return value


def records(manifest: dict[str, Any], folder: Path) -> list[FileRecord]:
    """The files a manifest lists."""
    return _records(manifest, folder / MANIFEST)


def _records(value: dict[str, Any], path: Path) -> list[FileRecord]:
    try:
        listed = [FileRecord(str(e["name"]), int(e["size"]), str(e["sha256"])) for e in value["files"]]
        if int(value["state"]["step"]) != value["step"]:
            raise ValueError("two steps")
        return listed
    except (KeyError, TypeError, ValueError, OverflowError):
        raise UserError("the manifest is incomplete", where=str(path)) from None


def problems(
    folder: Path, part: int = 0, parts: int = 1, on_progress: Callable[[Path], None] = lambda path: None
) -> list[str]:
    """Everything in which `folder` differs from its manifest; every file is read in full. Empty: verified.

    Args:
        part, parts: look at every `parts`-th file only, from number `part` on.
        on_progress: called again and again while a file is read, with its path.

    Raises:
        Unreadable: the disk fails, which leaves the question open.
    """
    try:
        manifest = read_manifest(folder)
    except Unreadable:
        raise
    except UserError as error:
        return [str(error)]
    found = []
    for record in records(manifest, folder)[part::parts]:
        path = folder / record.name
        try:
            if not path.is_file():
                found.append(f"{path}: missing")
            elif path.stat().st_size != record.size:
                found.append(f"{path}: {path.stat().st_size} bytes, {record.size} were written")
            elif file_sha256(path, partial(on_progress, path)) != record.sha256:
                found.append(f"{path}: the checksum is not that of what was written")
        except OSError as error:
            raise _unreadable(path, error) from None
    return found


def _unreadable(path: Path, error: OSError) -> Unreadable:
    return Unreadable(f"cannot be read: {error.strerror or error}", where=str(path), fix="check the disk and try again")


def library_versions() -> dict[str, str]:
    """Those of `LIBRARIES` that are installed, with their versions."""
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
