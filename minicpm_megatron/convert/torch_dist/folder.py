"""Folders of torch_dist checkpoints: Megatron-LM's tracker, the backend file, checksums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minicpm_megatron.convert.config_fields import read_json
from minicpm_megatron.convert.torch_dist.contents import METADATA
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import file_sha256

TRACKER = "latest_checkpointed_iteration.txt"
RELEASE = "release"  # Megatron-LM's name for a checkpoint of weights alone, of no iteration
BACKEND_FILE = "metadata.json"
BACKEND = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
_INTEGRITY = "integrity.json"  # of Megatron-LM's --verify-integrity
_FIX = "save it in Megatron-LM with --ckpt-format torch_dist"


def is_torch_dist(folder: Path) -> bool:
    """Return whether a folder looks like Megatron-LM's, or like one checkpoint in it."""
    return any((folder / name).is_file() for name in (TRACKER, METADATA)) or bool(_pickled(folder))


def checkpoint_folder(folder: Path) -> Path:
    """The checkpoint that is meant by a folder: itself, or the newest one by Megatron-LM's tracker.

    Raises:
        UserError: the tracker names none, or what it names is no torch_dist checkpoint.
    """
    tracker = folder / TRACKER
    if tracker.is_file() and not (folder / METADATA).is_file():
        folder = folder / _tracked(tracker)
        if not folder.is_dir():
            raise UserError(f"names {folder.name}, which is not there", where=str(tracker))
    if pickled := _pickled(folder):
        raise UserError(
            f"weights only as {pickled}, a pickle, and reading one runs whatever code it holds",
            where=str(folder),
            fix=_FIX,
        )
    if not (folder / BACKEND_FILE).is_file():  # torch_dcp and fsdp_dtensor have none either
        raise UserError(f"no {BACKEND_FILE}, so not a whole torch_dist checkpoint", where=str(folder), fix=_FIX)
    backend = read_json(folder / BACKEND_FILE)
    if any(backend.get(key) != value for key, value in BACKEND.items()):
        found = " version ".join(str(backend.get(key)) for key in BACKEND)
        raise UserError(f"a checkpoint of {found}", where=str(folder / BACKEND_FILE), fix=_FIX)
    return folder


def check_integrity(folder: Path) -> None:
    """Compare every file with Megatron's checksums, where it has saved any.

    Raises:
        UserError: naming the first file that is missing or is not what was saved.
    """
    path = folder / _INTEGRITY
    if not path.is_file():
        return
    files: Any = read_json(path).get("files")
    if not isinstance(files, dict) or not all(Path(name).name == name and name for name in files):
        raise UserError("not Megatron's checksums", where=str(path))
    for name, expected in files.items():
        try:
            found = file_sha256(folder / name)
        except OSError:
            raise UserError("missing", where=str(folder / name), fix="use another checkpoint") from None
        if found != expected:
            raise UserError(
                "the checksum is not that of what was saved", where=str(folder / name), fix="use another checkpoint"
            )


def _tracked(tracker: Path) -> str:
    text = tracker.read_text(errors="replace").strip()
    if text == RELEASE:
        return RELEASE
    if not text.isdecimal() or len(text) > 18:
        raise UserError(f"{text[:40]!r} is neither an iteration nor {RELEASE!r}", where=str(tracker))
    return f"iter_{int(text):07d}"


def _pickled(folder: Path) -> str:
    """A file of Megatron-LM's older format in a folder; empty where there is none."""
    return next((str(path.relative_to(folder)) for path in sorted(folder.glob("mp_rank_*/*.pt"))), "")
