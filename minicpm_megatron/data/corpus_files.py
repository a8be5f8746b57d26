"""Corpus files on disk: which there are, and how they are cut into segments.

A segment is the smallest thing that one worker reads: a byte range of a .jsonl, a row group of a .parquet, or a
whole compressed or plain file. Where the cuts fall depends on the files alone, never on the number of workers, so
any number of them produces the same bytes, and an interrupted run can go on where it stopped.

A .txt file is one document, as for every character-level corpus; use JSON Lines for many documents in one file.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from pathlib import Path

from minicpm_megatron.data.records import Rejected
from minicpm_megatron.errors import UserError

SUFFIXES = {
    ".jsonl": "jsonl",
    ".jsonl.gz": "gz",
    ".jsonl.zst": "zst",
    ".txt": "txt",
    ".parquet": "parquet",
}
SEGMENT_BYTES = 8 << 20


@dataclass(frozen=True)
class Segment:
    """A stretch of one file.

    Attributes:
        path: the file as the user named it or as it was found below a folder.
        kind: a value of `SUFFIXES`.
        start, end: bytes of the file; for parquet, row groups. A line belongs to the segment it begins in.
        size: input bytes, for progress.
    """

    path: str
    kind: str
    start: int
    end: int
    size: int


def file_kind(path: Path) -> str | None:
    """The format by the file's name, or None for one that we do not read."""
    return next((kind for suffix, kind in SUFFIXES.items() if path.name.endswith(suffix)), None)


def find_files(inputs: list[str]) -> tuple[list[Path], list[tuple[Path, Rejected]]]:
    """All corpus files named by `inputs` or below folders among them, in a fixed order.

    Returns:
        The files, and what was met below folders that is no readable file.

    Raises:
        UserError: an input does not exist, is of an unknown format, or no file is found.
    """
    files: list[Path] = []
    rejected: list[tuple[Path, Rejected]] = []
    for name in inputs:
        path = Path(name)
        try:
            mode_is_folder = path.stat() and path.is_dir()
        except OSError as error:
            what = "a link that leads back to itself" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
            raise UserError(f"cannot read the input: {what}", where=name, fix="check --input") from error
        if mode_is_folder:
            _walk(path, files, rejected, set())
        elif file_kind(path) is None:
            raise UserError("unknown format", where=name, fix=f"name it {', '.join(SUFFIXES)}")
        else:
            files.append(path)
    if not files:
        raise UserError(f"no file ending in {', '.join(SUFFIXES)}", where=", ".join(inputs), fix="check --input")
    return list(dict.fromkeys(files)), rejected


def _walk(folder: Path, files: list[Path], rejected: list[tuple[Path, Rejected]], above: set[tuple[int, int]]) -> None:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        rejected.append((folder, Rejected("symlink_loop")))
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        rejected.append((folder, Rejected("unreadable_file", os.strerror(error.errno or 0))))
        return
    for entry in entries:
        try:
            entry.stat()
        except OSError as error:
            if file_kind(entry) or error.errno == errno.ELOOP:
                reason = "symlink_loop" if error.errno == errno.ELOOP else "unreadable_file"
                rejected.append((entry, Rejected(reason, os.strerror(error.errno or 0))))
            continue
        if entry.is_dir():
            _walk(entry, files, rejected, above | {identity})
        elif file_kind(entry):
            files.append(entry)


def segments(path: Path) -> list[Segment]:
    """Cut a file into the segments that workers read."""
    kind, size = file_kind(path), path.stat().st_size
    assert kind is not None
    if kind == "jsonl":
        cuts = [*range(0, max(size, 1), SEGMENT_BYTES), size]
        return [Segment(str(path), kind, a, b, b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    if kind == "parquet" and size:
        return _row_groups(path, size)
    return [Segment(str(path), kind, 0, size, size)]


def _row_groups(path: Path, size: int) -> list[Segment]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as table:
            count = table.num_row_groups
    except (pa.ArrowException, OSError):
        count = 1  # the worker meets the same fault and reports it like every other
    count = max(count, 1)
    return [
        Segment(str(path), "parquet", group, group + 1, size * (group + 1) // count - size * group // count)
        for group in range(count)
    ]
