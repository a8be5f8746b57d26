"""Finished units joined into one corpus: .bin, .idx, the list of rejected records, and PREFIX.json as the seal.

Everything is streamed. The files are made in the work folder, read back with Megatron-Core's own class, and renamed
into place; PREFIX.json is written last, so that where it stands the other three are whole.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minicpm_megatron.data.indexed_format import bin_path, idx_path, open_index, write_index
from minicpm_megatron.data.megatron_dataset import open_indexed_dataset
from minicpm_megatron.data.metadata import TokenMetadata, json_path
from minicpm_megatron.data.records import REASONS, Rejected
from minicpm_megatron.data.tokenize_units import Setup, Unit, UnitResult, unit_file
from minicpm_megatron.data.tokenizers import Tokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import atomic_file, fsync_directory
from minicpm_megatron.storage.checksum import file_sha256

SHOWN_REJECTIONS = 3
"""Rejected records shown on standard error for each class; all are in PREFIX.rejected.jsonl."""
_BLOCK = 1 << 22


def rejected_path(prefix: str | Path) -> Path:
    """PREFIX.rejected.jsonl."""
    return Path(f"{prefix}.rejected.jsonl")


def join_units(
    units: list[Unit],
    results: list[UnitResult],
    unread: list[tuple[Path, Rejected]],
    setup: Setup,
    model: Tokenizer,
    plan: str,
    prefix: str | Path,
) -> TokenMetadata:
    """Publish PREFIX.bin, .idx, .rejected.jsonl and .json from the units' files in `setup.folder`.

    Args:
        units, results: all units and what each came to, in order.
        unread: what was met below input folders that could not be opened.
        setup, model, plan: what they were made with.

    Raises:
        UserError: there is no document, or a unit's file is damaged.
    """
    work, dtype = Path(setup.folder), np.dtype(setup.dtype)
    rejected = sum((Counter(result.rejected) for result in results), Counter(outcome.reason for _, outcome in unread))
    documents, tokens = sum(r.documents for r in results), sum(r.tokens for r in results)
    records = sum(result.records for result in results) + len(unread)
    if documents + rejected.total() != records:
        raise AssertionError(f"{documents} documents and {rejected.total()} rejected are not {records} records")
    if not documents:
        for _ in _rejections(units, results, unread, work):
            pass  # shows the first of each class
        raise UserError(
            "no document fell into the validation share"
            if setup.validation
            else f"no document in {records} records ({_counts(rejected)})",
            where=units[0].segments[0].path,
            fix="check --input and --json-key, or give more text or a larger --validation-share"
            if setup.validation
            else "check --input and --json-key",
        )
    joined = work / "joined"
    with atomic_file(bin_path(joined)) as handle:
        for unit, result in zip(units, results, strict=True):
            _append(unit_file(work, unit.number, "bin"), handle, result.bin_sha256)
    with atomic_file(idx_path(joined)) as handle:
        write_index(handle, dtype, documents, _Lengths(work, units))
    with atomic_file(rejected_path(joined)) as handle:
        for line in _rejections(units, results, unread, work):
            handle.write(line)
    metadata = TokenMetadata(
        vocab_size=model.vocab_size,
        max_id=max(result.max_id for result in results),
        tokenizer_sha256=model.sha256,
        bos_id=setup.bos_id,
        eod_id=setup.eod_id,
        dtype=dtype.name,
        documents=documents,
        tokens=tokens,
        text_bytes=sum(result.text_bytes for result in results),
        records=records,
        rejected=dict(sorted(rejected.items())),
        bin_bytes=bin_path(joined).stat().st_size,
        idx_bytes=idx_path(joined).stat().st_size,
        bin_sha256=file_sha256(bin_path(joined)),
        idx_sha256=file_sha256(idx_path(joined)),
        plan=plan,
    )
    _read_back(joined, metadata)
    json_path(prefix).unlink(missing_ok=True)  # from here until it is written, what stands there is not complete
    for path in (bin_path, idx_path, rejected_path):
        os.replace(path(joined), path(prefix))
    fsync_directory(work.parent)
    metadata.write(json_path(prefix))
    return metadata


class _Lengths:
    """Document lengths of all units in order, to be iterated more than once."""

    def __init__(self, work: Path, units: list[Unit]) -> None:
        self.paths = [unit_file(work, unit.number, "lengths") for unit in units]

    def __iter__(self) -> Iterator[np.ndarray]:
        for path in self.paths:
            yield np.fromfile(path, dtype="<i4")


def _append(path: Path, handle: BinaryIO, sha256: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as part:
        while block := part.read(_BLOCK):
            digest.update(block)
            handle.write(block)
    if digest.hexdigest() != sha256:
        raise UserError("the part is damaged", where=str(path), fix=f"remove {path.parent} and run again")


def _rejections(
    units: list[Unit], results: list[UnitResult], unread: list[tuple[Path, Rejected]], work: Path
) -> Iterator[bytes]:
    """All rejected records with the line in the whole file instead of the segment; the first few are shown."""
    shown: Counter[str] = Counter()

    def line(entry: dict[str, object]) -> bytes:
        reason = str(entry["reason"])
        if shown[reason] < SHOWN_REJECTIONS:
            place = f"{entry['file']}:{entry['line']}" if entry["line"] else str(entry["file"])
            detail = f" ({entry['detail']})" if entry["detail"] else ""
            print(
                f"rejected: {place}: {reason}: {REASONS[reason]}{detail}".encode("utf-8", "replace").decode(),
                file=sys.stderr,
            )
        shown[reason] += 1
        return json.dumps(entry, ensure_ascii=True).encode() + b"\n"

    for path, outcome in unread:
        yield line({"file": str(path), "line": 0, **asdict(outcome)})
    before: Counter[str] = Counter()
    for unit, result in zip(units, results, strict=True):
        starts = []
        for segment, lines in zip(unit.segments, result.lines, strict=True):
            starts.append(before[segment.path])
            before[segment.path] += lines
        with open(unit_file(work, unit.number, "rejected"), "rb") as handle:
            for content in handle:
                entry = json.loads(content)
                start = starts[entry.pop("segment")]
                yield line({**entry, "line": entry["line"] and start + entry["line"]})
    hidden = sum(max(0, count - SHOWN_REJECTIONS) for count in shown.values())
    if hidden:
        print(f"and {hidden} more: {_counts(shown)}", file=sys.stderr)


def _counts(rejected: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in rejected.most_common()) or "none"


def _read_back(prefix: Path, metadata: TokenMetadata) -> None:
    """Megatron-Core must read what we are about to publish as we meant it."""
    index, dataset = open_index(prefix), open_indexed_dataset(prefix)
    faithful = (
        len(dataset) == metadata.documents
        and index.tokens == metadata.tokens
        and np.array_equal(dataset.sequence_lengths[-1:], index.lengths[-1:])
        and len(dataset[metadata.documents - 1]) == index.lengths[-1]
        and (metadata.eod_id is None or dataset[metadata.documents - 1][-1] == metadata.eod_id)
    )
    if not faithful:
        raise AssertionError(f"Megatron-Core reads {prefix} differently from what was written")
