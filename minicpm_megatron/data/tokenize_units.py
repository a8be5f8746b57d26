"""The work of tokenising, cut into units that one process does alone and that are kept when the run is killed.

A unit is a list of segments of about equal size. Its results are three files in the work folder; the last of them,
written when the others are safe, says that the unit is done. What is in them depends on the unit alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from minicpm_megatron.data.corpus_files import SEGMENT_BYTES, Segment
from minicpm_megatron.data.read_segments import read_segment
from minicpm_megatron.data.records import Document, Rejected
from minicpm_megatron.data.tokenizers import Tokenizer, load_tokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import PARTIAL_SUFFIX, atomic_file, write_json

# texts given to the tokenizer at once: enough to make the call's cost vanish, little enough to stay in the cache
_BATCH_BYTES = 1 << 18
_BATCH_DOCUMENTS = 4096


@dataclass(frozen=True)
class Setup:
    """What every worker is told.

    Attributes:
        tokenizer: path of its file.
        key: member or column that holds the text.
        bos_id, eod_id: ids put before and after each document, None for none.
        dtype: numpy name of the ids' type.
        max_document_bytes: longest text.
        fail: stop at the first rejected record.
        folder: the work folder.
        validation_share, validation: of the documents, chosen by the hash of their text, and whether those or the
            others are taken.
    """

    tokenizer: str
    key: str
    bos_id: int | None
    eod_id: int | None
    dtype: str
    max_document_bytes: int
    fail: bool
    folder: str
    validation_share: float = 0.0
    validation: bool = False


@dataclass(frozen=True)
class Unit:
    """Segments that are tokenised together, in order."""

    number: int
    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        """Input bytes."""
        return sum(segment.size for segment in self.segments)


@dataclass(frozen=True)
class UnitResult:
    """What a unit came to; as JSON, the mark that it is done.

    Attributes:
        lines: for each segment, the lines or rows it holds.
        bin_sha256: of the ids' file.
        lengths_sha256: of the lengths' file.
    """

    documents: int
    tokens: int
    text_bytes: int
    records: int
    max_id: int
    rejected: dict[str, int]
    lines: list[int]
    bin_sha256: str
    lengths_sha256: str


def in_validation(text: str, share: float) -> bool:
    """Whether a document belongs to the `share` that is kept for validation.

    A hash of its text decides: whatever files it comes in and however often, it is never on both sides. The hash is
    one of its own, because corpora are often chosen or ordered by the SHA-256 of their texts.

    >>> [in_validation("a document", share) for share in (0.0, 0.1, 0.9)]
    [False, False, True]
    """
    if not share:
        return False
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"validation").digest()
    return int.from_bytes(digest, "big") < share * 2**64


def make_units(parts: list[Segment]) -> list[Unit]:
    """Group segments, in order, into units of at least one segment and about SEGMENT_BYTES."""
    units: list[Unit] = []
    group: list[Segment] = []
    for part in parts:
        if group and sum(member.size for member in group) + part.size > SEGMENT_BYTES:
            units.append(Unit(len(units), tuple(group)))
            group = []
        group.append(part)
    if group:
        units.append(Unit(len(units), tuple(group)))
    return units


def unit_file(folder: Path, number: int, kind: str) -> Path:
    """File of a unit: bin (ids), lengths (int32), rejected (JSON Lines) or json (the mark)."""
    return folder / f"unit-{number:08d}.{kind}"


def finished_result(setup: Setup, number: int) -> UnitResult | None:
    """The result of a unit that an earlier run finished, or None where there is none that can be used."""
    folder = Path(setup.folder)
    try:
        result = UnitResult(**json.loads(unit_file(folder, number, "json").read_bytes()))
        sizes = [unit_file(folder, number, kind).stat().st_size for kind in ("bin", "lengths")]
    except (OSError, ValueError, TypeError):
        return None
    whole = sizes == [result.tokens * np.dtype(setup.dtype).itemsize, result.documents * 4]
    # a run that skipped records leaves units that one with --on-error fail has to meet again
    return result if whole and not (setup.fail and result.rejected) else None


def make_worker(setup: Setup) -> Callable[[Unit, Callable[[int], None]], UnitResult]:
    """The function that does one unit (see `worker_pool`)."""
    tokenizer = load_tokenizer(setup.tokenizer)
    return lambda unit, report: tokenize_unit(unit, setup, tokenizer, report)


def tokenize_unit(unit: Unit, setup: Setup, tokenizer: Tokenizer, report: Callable[[int], None]) -> UnitResult:
    """Read, encode and store a unit.

    Raises:
        UserError: a record is rejected and `setup.fail` is set; or the disk is full.
    """
    folder = Path(setup.folder)
    try:
        with contextlib.ExitStack() as stack:
            writer = _UnitWriter(
                setup,
                tokenizer,
                *(
                    stack.enter_context(atomic_file(unit_file(folder, unit.number, kind)))
                    for kind in ("bin", "lengths", "rejected")
                ),
            )
            for position, segment in enumerate(unit.segments):
                writer.read(position, segment, report)
            result = writer.result()
        write_json(unit_file(folder, unit.number, "json"), asdict(result))
    except OSError as error:
        raise UserError(
            f"cannot write: {error.strerror}",
            where=str(folder),
            fix="free the disk, then run the same command again to go on",
        ) from error
    return result


class _UnitWriter:
    def __init__(
        self, setup: Setup, tokenizer: Tokenizer, ids: BinaryIO, lengths: BinaryIO, rejected: BinaryIO
    ) -> None:
        self.setup, self.tokenizer = setup, tokenizer
        self.files = {"bin": ids, "lengths": lengths, "rejected": rejected}
        self.hashes = {"bin": hashlib.sha256(), "lengths": hashlib.sha256()}
        self.counts: Counter[str] = Counter()
        self.documents = self.tokens = self.text_bytes = 0
        self.max_id = -1
        self.lines: list[int] = []
        self.batch: list[str] = []
        self.batch_bytes = 0
        self.before, self.after = (
            np.array([] if token is None else [token], dtype=np.int32) for token in (setup.bos_id, setup.eod_id)
        )

    def read(self, position: int, segment: Segment, report: Callable[[int], None]) -> None:
        unreported, line = 0, 0

        def progress(size: int) -> None:
            nonlocal unreported
            unreported += size
            if unreported >= _BATCH_BYTES:
                report(unreported)
                unreported = 0

        for record in read_segment(
            segment, key=self.setup.key, max_bytes=self.setup.max_document_bytes, progress=progress
        ):
            line = max(line, record.line)
            if isinstance(record.outcome, Document):
                if in_validation(record.outcome.text, self.setup.validation_share) == self.setup.validation:
                    self._take(record.outcome)
            elif not self.setup.validation:  # reported once, with the documents to train on
                self._reject(position, segment, record.line, record.outcome)
        self._flush()
        self.lines.append(line)
        report(unreported)

    def _take(self, document: Document) -> None:
        self.batch.append(document.text)
        self.batch_bytes += document.size
        self.text_bytes += document.size
        self.documents += 1
        if self.batch_bytes >= _BATCH_BYTES or len(self.batch) >= _BATCH_DOCUMENTS:
            self._flush()

    def _reject(self, position: int, segment: Segment, line: int, outcome: Rejected) -> None:
        if self.setup.fail:
            place = f"{segment.path}:{_lines_before(segment) + line}" if line else segment.path
            what = f"{outcome.reason}: {outcome.detail}" if outcome.detail else outcome.reason
            raise UserError(f"record rejected ({what})", where=place, fix="mend it or give --on-error skip")
        self.counts[outcome.reason] += 1
        entry = {"file": segment.path, "segment": position, "line": line, **asdict(outcome)}
        self.files["rejected"].write(json.dumps(entry, ensure_ascii=True).encode() + b"\n")

    def _flush(self) -> None:
        if not self.batch:
            return
        parts: list[np.ndarray] = []
        lengths = np.empty(len(self.batch), dtype="<i4")
        for number, ids in enumerate(self.tokenizer.encode_batch(self.batch)):
            parts += (self.before, ids, self.after)
            lengths[number] = len(self.before) + len(ids) + len(self.after)
        flat = np.concatenate(parts)
        self.max_id = max(self.max_id, int(flat.max(initial=-1)))
        self.tokens += len(flat)
        for kind, content in (("bin", flat.astype(self.setup.dtype).tobytes()), ("lengths", lengths.tobytes())):
            self.files[kind].write(content)
            self.hashes[kind].update(content)
        self.batch, self.batch_bytes = [], 0

    def result(self) -> UnitResult:
        return UnitResult(
            documents=self.documents,
            tokens=self.tokens,
            text_bytes=self.text_bytes,
            records=self.documents + self.counts.total(),
            max_id=self.max_id,
            rejected=dict(self.counts),
            lines=self.lines,
            bin_sha256=self.hashes["bin"].hexdigest(),
            lengths_sha256=self.hashes["lengths"].hexdigest(),
        )


def _lines_before(segment: Segment) -> int:
    """Lines, or rows, of the file before the segment; counted only where one record ends the run."""
    if segment.kind == "parquet":
        import pyarrow.parquet as pq

        with pq.ParquetFile(segment.path) as table:
            return sum(table.metadata.row_group(group).num_rows for group in range(segment.start))
    if not segment.start:
        return 0
    count, left = 0, segment.start
    with open(segment.path, "rb") as handle:
        while left and (block := handle.read(min(left, 1 << 20))):
            count, left = count + block.count(b"\n"), left - len(block)
        # a line that begins before the segment and ends inside it belongs to what is before
        handle.seek(segment.start - 1)
        return count + (handle.read(1) != b"\n")


def remove_unit_files(folder: Path) -> None:
    """Delete what units left in `folder`, finished or not."""
    for path in folder.glob("unit-*"):
        path.unlink()
    for path in folder.glob(f"*{PARTIAL_SUFFIX}"):
        path.unlink()
