"""A save that survives anything: at every moment either the new checkpoint or the one before is whole.

Every rank writes its file under a temporary name into step-N.tmp, fsyncs and renames it, and hashes what it wrote.
The ranks exchange what happened, and one error fails the save on all of them with the same words. Then rank 0 writes
the manifest, renames step-N.tmp to step-N, and only then replaces the hint `latest`.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from minicpm_megatron.checkpoint.names import LATEST, REPLACED, TEMPORARY, step_folder
from minicpm_megatron.checkpoint.ranks import Ranks
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import fsync_directory, write_bytes
from minicpm_megatron.storage.checksum import FileRecord
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.storage.sharded import Fragment, rank_file, write_fragments

log = logging.getLogger(__name__)
PHASES = ("prepare", "write", "written", "manifest", "rename", "latest", "done")
SMALL_FILES = 1 << 20  # bytes of headers and manifest, generously


def publish(
    directory: Path,
    step: int,
    fragments: Iterable[Fragment],
    *,
    rank_tensors: dict[str, Tensor],
    state: dict[str, Any],
    facts: dict[str, Any],
    ranks: Ranks,
    on_phase: Callable[[str], None],
) -> Path:
    """Save one checkpoint; collective over `ranks`.

    Raises:
        UserError: on every rank, with the same words, when any rank could not write; nothing is left behind and
            earlier checkpoints are untouched.
    """
    pieces = list(fragments)
    needed = sum(piece.valid.numel() * piece.tensor.element_size() for piece in pieces)
    needed = sum(ranks.gather(needed)) + SMALL_FILES
    final = step_folder(directory, step)
    temporary = final.with_name(final.name + TEMPORARY)
    on_phase("prepare")
    _together(ranks, lambda: _prepare(directory, temporary, needed), temporary, needed, only_first=True)
    on_phase("write")
    record = _together(
        ranks,
        lambda: asdict(write_fragments(temporary / rank_file(ranks.rank), pieces, rank_tensors)),
        temporary,
        needed,
    )
    on_phase("written")
    files = [FileRecord(**entry) for entry in record]

    def finish() -> None:
        on_phase("manifest")
        write_manifest(temporary, files, state=state, facts=facts)
        fsync_directory(temporary)
        on_phase("rename")
        _rename(temporary, final)
        on_phase("latest")
        _write_hint(directory, final)

    _together(ranks, finish, temporary, needed, only_first=True)
    on_phase("done")
    return final


def _prepare(directory: Path, temporary: Path, needed: int) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(temporary, ignore_errors=True)
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(errno.ENOSPC, "the disk is too full")
    temporary.mkdir()


def _write_hint(directory: Path, final: Path) -> None:
    try:
        write_bytes(directory / LATEST, f"{final.name}\n".encode())
    except OSError as error:
        # the checkpoint is published; nothing reads the hint but people
        log.warning("%s could not be written: %s", directory / LATEST, error.strerror)


def _rename(temporary: Path, final: Path) -> None:
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        shutil.rmtree(replaced, ignore_errors=True)
        os.rename(final, replaced)
    try:
        os.rename(temporary, final)
    except OSError:
        if replaced.exists():
            os.rename(replaced, final)
        raise
    fsync_directory(final.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def _together(
    ranks: Ranks, action: Callable[[], Any], temporary: Path, needed: int, *, only_first: bool = False
) -> list[Any]:
    """Do `action` on every rank (or the first), and fail on all of them if it failed on one."""
    outcome: dict[str, Any] = {"value": None, "error": None, "defect": False}
    if ranks.rank == 0 or not only_first:
        try:
            outcome["value"] = action()
        except OSError as error:
            outcome["error"] = error.strerror or str(error)
        except Exception as error:
            # a defect of ours; the others must hear of it all the same, or they would wait for ever
            log.exception("saving failed")
            outcome |= {"error": f"{type(error).__name__}: {error}", "defect": True}
    outcomes = ranks.gather(outcome)
    for rank, entry in enumerate(outcomes):
        if entry["error"] is not None:
            if ranks.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            if entry["defect"]:
                raise RuntimeError(f"saving failed on rank {rank}: {entry['error']}")
            free = ranks.from_first(_free(temporary.parent))
            raise UserError(
                f"saving failed on rank {rank}: {entry['error']} ({needed:,} bytes are needed, {free:,} are free)",
                where=str(temporary.parent),
                fix="free some space or choose another run.directory; earlier checkpoints are intact",
            )
    return [entry["value"] for entry in outcomes]


def _free(directory: Path) -> int:
    try:
        while not directory.exists():
            directory = directory.parent
        return shutil.disk_usage(directory).free
    except OSError:
        return 0
