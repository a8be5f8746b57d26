"""A folder that appears whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import PARTIAL_SUFFIX, fsync_directory

_MODEL_FILES = ("config.json", "manifest.json")
_TORCH_DIST = {"latest_checkpointed_iteration.txt", "release"}
_REPLACED_SUFFIX = ".replaced"


def check_output(target: Path, *, source: Path, overwrite: bool) -> None:
    """Refuse an output folder that holds something, before any work is done.

    Args:
        target: the folder to be made; its parents may be missing.
        source: the folder that is read.
        overwrite: replace what is there, provided it is a model.
    Raises:
        UserError: `target` is a file, the source or a folder around it, not empty, or not a model's.
    """
    where, real = str(target), target.resolve()
    if real == source.resolve() or real in source.resolve().parents:
        raise UserError("the output would replace the input", where=where, fix="give another --output")
    try:
        occupied = any(real.iterdir()) if real.is_dir() else False
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=where) from None
    if real.exists() and not real.is_dir():
        raise UserError("the output is a file", where=where, fix="give a folder")
    if occupied and not overwrite:
        raise UserError("the output folder is not empty", where=where, fix="give another one, or --overwrite")
    if occupied and not _is_model(real):
        raise UserError("the output folder holds something that is not a model", where=where, fix="give another one")


def _is_model(folder: Path) -> bool:
    """Return whether a folder is one model. Where Megatron-LM has saved, there is more beside a conversion of ours: to
    replace such a folder would remove every iteration."""
    return any((folder / name).is_file() for name in _MODEL_FILES) or _TORCH_DIST >= {p.name for p in folder.iterdir()}


def check_space(target: Path, needed: int) -> None:
    """Raise UserError unless the disk under `target` has `needed` bytes free."""
    parent = next(p for p in target.resolve().parents if p.exists())
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise _disk_full(target, needed, free)


def _disk_full(target: Path, needed: int, free: int) -> UserError:
    return UserError(f"{needed:,} bytes are needed and {free:,} are free", where=str(target), fix="free some space")


@contextlib.contextmanager
def atomic_folder(target: Path, *, needed: int) -> Iterator[Path]:
    """Yield a path beside `target`, for the block to make a folder at, which becomes `target` if the block succeeds.

    What stood at `target` is replaced then and not before; on an error it is untouched and the new folder is removed.

    Args:
        needed: bytes that will be written, for the message when they do not fit.
    Raises:
        UserError: the place cannot be written, or the disk is full.
    """
    real = target.resolve()
    partial = real.with_name(real.name + PARTIAL_SUFFIX)
    try:
        real.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)  # of an earlier conversion that was killed
        yield partial
        for path in partial.rglob("*"):
            _fsync(path)
        fsync_directory(partial)
        _replace(partial, real)
        fsync_directory(real.parent)
    except BaseException as error:
        free = shutil.disk_usage(partial.parent).free if partial.parent.exists() else 0
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise _disk_full(target, needed, free) from None
        if isinstance(error, OSError):
            raise UserError(f"cannot be written: {error.strerror or error}", where=str(target)) from None
        raise


def _replace(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    old = target.with_name(target.name + _REPLACED_SUFFIX)
    shutil.rmtree(old, ignore_errors=True)
    os.rename(target, old)
    try:
        os.rename(new, target)
    except OSError:
        os.rename(old, target)
        raise
    shutil.rmtree(old)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
