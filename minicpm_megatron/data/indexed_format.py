"""Megatron's .bin/.idx: the layout, a writer that never holds the corpus, and checks that a pair is whole.

PREFIX.bin holds the token ids of all documents one after another. PREFIX.idx holds, little-endian: the magic
"MMIDIDX\\0\\0", version 1 (u64), a code for the ids' type (u8), the number of sequences (u64) and of document bounds
(u64), then the length of each sequence (i32), its byte offset in .bin (i64) and the sequence that each document begins
with (i64, one more than documents). What we write has one sequence a document. The layout is that of
megatron.core.datasets.indexed_dataset, which reads our files in the tests and before they are published.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minicpm_megatron.errors import UserError

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
DTYPES: dict[int, np.dtype] = {
    code: np.dtype(name)
    for code, name in {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}.items()
}
"""Type codes of Megatron's DType."""
_HEADER = struct.Struct("<9sQBQQ")
# Megatron's DType.optimal_dtype
_UINT16_VOCABULARY = 65500
_REMAKE = "make it again with minicpm preprocess"


def token_dtype(vocab_size: int) -> np.dtype:
    """The type Megatron keeps ids of such a vocabulary in: uint16 below 65,500 pieces, else int32."""
    return np.dtype("<u2") if vocab_size < _UINT16_VOCABULARY else np.dtype("<i4")


def bin_path(prefix: str | Path) -> Path:
    """PREFIX.bin."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """PREFIX.idx."""
    return Path(f"{prefix}.idx")


def write_index(handle: BinaryIO, dtype: np.dtype, documents: int, lengths: Iterable[np.ndarray]) -> None:
    """Write a .idx for documents of the given lengths, one sequence each.

    Args:
        handle: where to; written from its current position in one pass.
        dtype: type of the ids in .bin.
        documents: how many there are.
        lengths: their lengths in tokens as int32 arrays, in order; iterated twice.
    """
    code = next(code for code, known in DTYPES.items() if known == dtype)
    handle.write(_HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
    for block in lengths:
        handle.write(block.astype("<i4", copy=False).tobytes())
    offset = 0
    for block in lengths:
        ends = offset + np.cumsum(block, dtype=np.int64) * dtype.itemsize
        handle.write(np.concatenate(([offset], ends[:-1])).astype("<i8").tobytes() if len(block) else b"")
        offset = int(ends[-1]) if len(block) else offset
    step = 1 << 20
    for first in range(0, documents + 1, step):
        handle.write(np.arange(first, min(first + step, documents + 1), dtype="<i8").tobytes())


@dataclass(frozen=True)
class Index:
    """A checked .idx, memory-mapped.

    Attributes:
        dtype: type of the ids in .bin.
        lengths: int32 [sequences], tokens.
        offsets: int64 [sequences], bytes.
        documents: int64 [documents + 1], first sequence of each document.
        tokens: sum of the lengths.
    """

    dtype: np.dtype
    lengths: np.ndarray
    offsets: np.ndarray
    documents: np.ndarray
    tokens: int


def open_index(prefix: str | Path) -> Index:
    """Map PREFIX.idx and check that it and PREFIX.bin are whole and belong together.

    Raises:
        UserError: a file is missing, cut off, of another format, or the two differ.
    """
    idx, content = idx_path(prefix), bin_path(prefix)
    for path in (idx, content):
        if not path.is_file():
            raise UserError("no such token file", where=str(path), fix="check the prefix or run preprocess_data.py")
    size = idx.stat().st_size
    with open(idx, "rb") as handle:
        header = handle.read(_HEADER.size)
    if len(header) < _HEADER.size or not header.startswith(MAGIC):
        raise UserError("not an index of Megatron's", where=str(idx), fix=_REMAKE)
    _, version, code, sequences, bounds = _HEADER.unpack(header)
    if version != VERSION or code not in DTYPES or DTYPES[code].kind == "f":
        raise UserError(f"an index of version {version} and type {code} is not supported", where=str(idx), fix=_REMAKE)
    # 12 bytes a sequence; some writers add one byte a sequence for multimodal data
    expected = _HEADER.size + 12 * sequences + 8 * bounds
    if size not in (expected, expected + sequences):
        raise UserError(f"cut off or damaged: {size} bytes where {expected} are due", where=str(idx), fix=_REMAKE)
    lengths = _map(idx, "<i4", _HEADER.size, sequences)
    offsets = _map(idx, "<i8", _HEADER.size + 4 * sequences, sequences)
    documents = _map(idx, "<i8", _HEADER.size + 12 * sequences, bounds)
    _check_order(idx, DTYPES[code], lengths, offsets, documents)
    tokens = int(lengths.sum(dtype=np.int64))
    due, found = tokens * DTYPES[code].itemsize, content.stat().st_size
    if found != due:
        raise UserError(f"{found} bytes where its index wants {due}", where=str(content), fix=_REMAKE)
    return Index(DTYPES[code], lengths, offsets, documents, tokens)


def _map(path: Path, dtype: str, offset: int, count: int) -> np.ndarray:
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r", offset=offset, shape=(count,))


def _check_order(idx: Path, dtype: np.dtype, lengths: np.ndarray, offsets: np.ndarray, documents: np.ndarray) -> None:
    """Offsets must be the running sum of lengths, or reading would run into other documents or out of the file."""
    step, running = 1 << 22, 0
    for first in range(0, len(lengths), step):
        block = lengths[first : first + step].astype(np.int64)
        ends = running + np.cumsum(block) * dtype.itemsize
        due = np.concatenate(([running], ends[:-1]))
        if block.min() < 0 or not np.array_equal(offsets[first : first + step], due):
            raise UserError("offsets and lengths contradict each other", where=str(idx), fix=_REMAKE)
        running = int(ends[-1])
    falls = any((np.diff(documents[first : first + step + 1]) < 0).any() for first in range(0, len(documents), step))
    if len(documents) == 0 or documents[0] != 0 or documents[-1] != len(lengths) or falls:
        raise UserError("document bounds are damaged", where=str(idx), fix=_REMAKE)
