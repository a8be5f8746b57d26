"""The records of one segment of a corpus file, whatever its format, with bounded memory.

Damage is never an exception here: a line that is too long, a stream that breaks off or a file that cannot be opened
is a record of its own, counted and reported like a malformed line.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from minicpm_megatron.data.corpus_files import Segment
from minicpm_megatron.data.records import (
    Document,
    Rejected,
    check_text,
    max_line_bytes,
    parse_json_line,
    parse_plain,
)

_READ_BYTES = 1 << 20
_COMPRESSED_BYTES = 1 << 14
# Given to a decompressor at once, because a few bytes can stand for many and everything that they stand for comes
# back at once. 4 bytes are the shortest block of Zstandard and 128 KiB the longest content of one, so 256 bytes give
# 8 MiB at most. DEFLATE packs 1,032 times at most, so 16 KiB give 16 MiB.
_BYTES_A_CALL = {"gz": _COMPRESSED_BYTES, "zst": 1 << 8}
_BOM = b"\xef\xbb\xbf"


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


def _range_lines(handle: BinaryIO, segment: Segment, max_bytes: int, progress: Progress) -> Iterator[bytes | Rejected]:
    """Lines that begin inside [start, end); a line that begins before is the previous segment's."""
    limit = max_line_bytes(max_bytes)
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
    limit = max_line_bytes(max_bytes)
    pending: list[bytes] = []
    pending_bytes, dropped, first, seen = 0, 0, True, 0
    damage: Rejected | None = None
    try:
        for chunk in _decompressed(handle, kind):
            progress(handle.tell() - seen)
            seen = handle.tell()
            if first and chunk:
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
    except EOFError:
        damage = Rejected("truncated_stream", "ends in the middle of the compressed data")
    except _Damaged as error:
        damage = Rejected("corrupt_stream", str(error)[:120])
    if damage is not None:
        yield damage  # what stands of the line that the damage cut is part of it
    elif dropped:
        yield Rejected("document_too_large", f"a line of {dropped} bytes")
    elif pending:
        yield b"".join(pending)


class _Damaged(Exception):
    """The compressed data are not what their format allows."""


def _decompressed(handle: BinaryIO, kind: str) -> Iterator[bytes]:
    """The content of a .gz or .zst of one or more members, up to the point of damage.

    The libraries' file objects give nothing of the block in which a stream breaks off, and that of zstandard does
    not tell that it does.

    Raises:
        EOFError: the data end inside a member.
        _Damaged: they are no such data.
    """
    import zstandard

    # 2 GiB is the largest window that `zstd --ultra --long=31` writes
    zstd = zstandard.ZstdDecompressor(max_window_size=1 << 31)

    def new_member() -> Any:
        return zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if kind == "gz" else zstd.decompressobj()

    def blocks() -> Iterator[bytes]:
        step = _BYTES_A_CALL[kind]
        while read := handle.read(_COMPRESSED_BYTES):
            yield from (read[first : first + step] for first in range(0, len(read), step))

    member, inside = new_member(), False
    try:
        for block in blocks():
            while block:
                if kind == "gz" and not inside and not (block := block.lstrip(b"\0")):
                    break  # members may be padded with zeros
                inside = True
                yield member.decompress(block)
                block = b""
                if member.eof:
                    block, member, inside = member.unused_data, new_member(), False
    except (zlib.error, zstandard.ZstdError) as error:
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
