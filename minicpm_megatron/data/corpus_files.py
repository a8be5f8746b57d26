"""Corpus files on disk: which there are, how they are cut into segments, and what records a segment holds.

A segment is the smallest thing that one worker reads: a byte range of a .jsonl, a row group of a .parquet, or a
whole compressed or plain file. Where the cuts fall depends on the files alone, never on the number of workers, so
any number of them produces the same bytes, and an interrupted run can go on where it stopped.

A .txt file is one document, as for every character-level corpus; use JSON Lines for many documents in one file.
"""

from __future__ import annotations

import errno
import gzip
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

from minicpm_megatron.data.records import (
    LINE_BYTES_PER_TEXT_BYTE,
    Document,
    Rejected,
    check_text,
    parse_json_line,
    parse_plain,
)
from minicpm_megatron.errors import UserError

SUFFIXES = {
    ".jsonl": "jsonl", ".jsonl.gz": "gz", ".jsonl.zst": "zst", ".txt": "txt", ".parquet": "parquet",
}  # fmt: skip
SEGMENT_BYTES = 8 << 20
_READ_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"


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


@dataclass(frozen=True)
class Record:
    """One record of a segment.

    Attributes:
        line: 1 for the segment's first line or row, 0 where the whole file is meant.
        outcome: the document, or why there is none.
    """

    line: int
    outcome: Document | Rejected


class Progress(Protocol):
    """Called with the number of input bytes read since the last call."""

    def __call__(self, size: int) -> None: ...


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


def _walk(
    folder: Path, files: list[Path], rejected: list[tuple[Path, Rejected]], above: set[tuple[int, int]]
) -> None:
    status = folder.stat()
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        rejected.append((folder, Rejected("symlink_loop")))
        return
    for entry in sorted(folder.iterdir()):
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


def read_segment(segment: Segment, *, key: str, max_bytes: int, progress: Progress) -> Iterator[Record]:
    """The records of a segment in order.

    Args:
        key: member of the object, or column of the table, that holds the text.
        max_bytes: largest document in UTF-8 bytes; longer ones are never held in memory.
    """
    path = Path(segment.path)
    try:
        if path.stat().st_size == 0:
            yield Record(0, Rejected("empty_file"))
            return
        if segment.kind == "parquet":
            yield from _read_parquet(segment, key, max_bytes)
            progress(segment.size)
            return
        with open(path, "rb") as handle:
            if segment.kind == "txt":
                yield Record(0, _read_plain(handle, segment, max_bytes))
                progress(segment.size)
                return
            lines = (
                _range_lines(handle, segment, max_bytes, progress)
                if segment.kind == "jsonl"
                else _stream_lines(handle, segment.kind, max_bytes, progress)
            )
            number = 0
            for number, line in enumerate(lines, start=1):
                if isinstance(line, Rejected):
                    yield Record(number, line)
                else:
                    yield Record(number, parse_json_line(line, key=key, max_bytes=max_bytes))
    except OSError as error:
        yield Record(0, Rejected("unreadable_file", os.strerror(error.errno) if error.errno else str(error)))


def _read_plain(handle: BinaryIO, segment: Segment, max_bytes: int) -> Document | Rejected:
    if segment.size > max_bytes + len(_BOM):
        return Rejected("document_too_large", f"{segment.size} bytes")
    return parse_plain(handle.read().removeprefix(_BOM), max_bytes=max_bytes)


def _range_lines(
    handle: BinaryIO, segment: Segment, max_bytes: int, progress: Progress
) -> Iterator[bytes | Rejected]:
    """Lines that begin inside [start, end); a line that begins before is the previous segment's."""
    limit = max_bytes * LINE_BYTES_PER_TEXT_BYTE
    if segment.start:
        handle.seek(segment.start - 1)
        while (skipped := handle.readline(_READ_BYTES)) and not skipped.endswith(b"\n"):
            pass
    while (position := handle.tell()) < segment.end:
        line = handle.readline(limit + 1)
        if not line:
            break
        length = len(line)
        if length > limit and not line.endswith(b"\n"):
            while (rest := handle.readline(_READ_BYTES)) and not rest.endswith(b"\n"):
                length += len(rest)
            length += len(rest)
            yield Rejected("document_too_large", f"a line of {length} bytes")
        else:
            yield line.removeprefix(_BOM) if position == 0 else line
        progress(length)


def _stream_lines(handle: BinaryIO, kind: str, max_bytes: int, progress: Progress) -> Iterator[bytes | Rejected]:
    """Lines of a compressed file; damage ends it with a record that says so."""
    limit = max_bytes * LINE_BYTES_PER_TEXT_BYTE
    pending: list[bytes] = []
    pending_bytes, dropped, first, seen = 0, 0, True, 0
    chunks = _gunzip(handle) if kind == "gz" else _unzstd(handle)
    damage: Rejected | None = None
    while damage is None:
        try:
            chunk = next(chunks, None)
        except EOFError:
            damage = Rejected("truncated_stream", "ends in the middle of the compressed data")
            break
        except _DAMAGE as error:
            damage = Rejected("corrupt_stream", str(error)[:120])
            break
        if chunk is None:
            break
        progress(handle.tell() - seen)
        seen = handle.tell()
        if first:
            chunk, first = chunk.removeprefix(_BOM), False
        *complete, tail = chunk.split(b"\n")
        for piece in complete:
            if dropped or pending_bytes + len(piece) > limit:
                yield Rejected("document_too_large", f"a line of {dropped + pending_bytes + len(piece)} bytes")
            else:
                yield b"".join((*pending, piece))
            pending, pending_bytes, dropped = [], 0, 0
        if dropped or pending_bytes + len(tail) > limit:
            dropped += pending_bytes + len(tail)
            pending, pending_bytes = [], 0
        elif tail:
            pending.append(tail)
            pending_bytes += len(tail)
    if damage is not None:
        yield damage  # what stands of the line that the damage cut is part of it
    elif dropped:
        yield Rejected("document_too_large", f"a line of {dropped} bytes")
    elif pending:
        yield b"".join(pending)


class _Damaged(Exception):
    """The compressed data are not what their format allows."""


_DAMAGE = (_Damaged, gzip.BadGzipFile, zlib.error)


def _gunzip(handle: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=handle, mode="rb") as stream:
        while chunk := stream.read(_READ_BYTES):
            yield chunk


def _unzstd(handle: BinaryIO) -> Iterator[bytes]:
    import zstandard

    # 2 GiB, the largest window `zstd --ultra --long=31` writes: refusing it would lose data, and few files ask
    decoder = zstandard.ZstdDecompressor(max_window_size=1 << 31)
    frame, inside = decoder.decompressobj(), False
    try:
        while block := handle.read(_READ_BYTES >> 3):
            while block:
                inside = True
                output = frame.decompress(block)
                if output:
                    yield output
                block = frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame, inside = decoder.decompressobj(), False
    except zstandard.ZstdError as error:
        raise _Damaged(str(error)) from error
    if inside:
        raise EOFError


def _read_parquet(segment: Segment, key: str, max_bytes: int) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(segment.path) as table:
            if table.num_row_groups == 0:
                return
            if key not in table.schema_arrow.names:
                yield Record(0, Rejected("missing_key", f"no column {key!r}"))
                return
            for batch in table.iter_batches(row_groups=[segment.start], columns=[key], batch_size=256):
                for value in batch.column(0):
                    row += 1
                    yield Record(row, _parquet_text(value, max_bytes))
    except (pa.ArrowException, OSError) as error:
        yield Record(row + 1 if row else 0, Rejected("corrupt_stream", " ".join(str(error).split())[:120]))


def _parquet_text(value: object, max_bytes: int) -> Document | Rejected:
    try:
        return check_text(value.as_py(), max_bytes=max_bytes)  # type: ignore[attr-defined]
    except UnicodeDecodeError as error:
        return Rejected("bad_utf8", f"byte {error.start}: {error.reason}")
