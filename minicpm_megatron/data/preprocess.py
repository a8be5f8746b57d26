"""Raw text to Megatron's .bin/.idx on many processes, interruptible at any moment.

The inputs are cut into units (`tokenize_units`) that depend on the files alone. Each unit's result lands atomically
in PREFIX.work/; when all are there they are joined in order, read back with Megatron-Core's own class and renamed
into place, PREFIX.json last. A run that was killed goes on from the finished units, and what it produces is byte for
byte what an undisturbed run with any number of workers produces. Results of other inputs, options or tokenizers are
never reused: PREFIX.work/plan.json holds the hash of all that decides the bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minicpm_megatron.data.corpus_files import find_files, segments
from minicpm_megatron.data.indexed_format import bin_path, idx_path, open_index, token_dtype, write_index
from minicpm_megatron.data.metadata import TokenMetadata, file_sha256, json_path, read_metadata
from minicpm_megatron.data.progress import progress_bar
from minicpm_megatron.data.records import REASONS, Rejected
from minicpm_megatron.data.tokenize_units import (
    Setup,
    Unit,
    UnitResult,
    finished_result,
    make_units,
    remove_unit_files,
    unit_file,
)
from minicpm_megatron.data.tokenizer import Tokenizer
from minicpm_megatron.data.worker_pool import run_tasks
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import atomic_file, fsync_directory, write_json

UNIT_FORMAT = 1
"""Raised when the same plan would give other bytes than before."""
SHOWN_REJECTIONS = 3
"""Rejected records shown on standard error for each class; all are in PREFIX.rejected.jsonl."""
_BLOCK = 1 << 22
_WORKER = "minicpm_megatron.data.tokenize_units:make_worker"


@dataclass(frozen=True)
class Options:
    """What decides the tokens besides inputs and tokenizer.

    Attributes:
        key: member of each JSON object, or column of each table, that holds the text.
        prepend_bos: put <s> before each document, as the published tokenizer does before a prompt.
        append_eod: put </s> after each document.
        max_document_bytes: longer documents are rejected.
        fail: stop at the first rejected record instead of skipping it.
    """

    key: str = "text"
    prepend_bos: bool = True
    append_eod: bool = True
    max_document_bytes: int = 64 << 20
    fail: bool = False


def rejected_path(prefix: str | Path) -> Path:
    """PREFIX.rejected.jsonl."""
    return Path(f"{prefix}.rejected.jsonl")


def preprocess(
    inputs: list[str], tokenizer: str | Path, prefix: str | Path, *, workers: int = 1, options: Options | None = None,
    overwrite: bool = False, show_progress: bool = True,
) -> TokenMetadata:  # fmt: skip
    """Tokenise `inputs` into PREFIX.bin, PREFIX.idx, PREFIX.rejected.jsonl and PREFIX.json.

    Args:
        inputs: files or folders in any supported format.
        tokenizer: folder or sentencepiece model.
        prefix: path without suffix; its folder is made.
        workers: processes that tokenise.
        overwrite: replace tokens of another plan that stand at `prefix`.

    Returns:
        What PREFIX.json holds.

    Raises:
        UserError: the input, tokenizer or output cannot be used; with `options.fail`, a record was rejected.
    """
    options = options or Options()
    if workers < 1:
        raise UserError(f"{workers} workers cannot do it", where="--workers", fix="give 1 or more")
    if not 1 <= options.max_document_bytes <= 1 << 30:
        raise UserError(f"{options.max_document_bytes} is out of range", where="--max-document-bytes",
                        fix="give 1 to 1073741824")  # fmt: skip
    model = Tokenizer(tokenizer)
    ids = {"<s>": model.bos_id if options.prepend_bos else None, "</s>": model.eos_id if options.append_eod else None}
    for name, index in ids.items():
        if index is not None and index < 0:
            raise UserError(f"the tokenizer has no {name}", where=str(model.path), fix="choose another tokenizer")
    files, unread = find_files(inputs)
    if unread and options.fail:
        path, outcome = unread[0]
        raise UserError(f"record rejected ({outcome.reason})", where=str(path), fix="mend it or give --on-error skip")
    units = make_units([segment for file in files for segment in segments(file)])
    plan = _plan(files, unread, model, options)

    existing = read_metadata(prefix) if not overwrite else None
    if existing is not None and existing.plan == plan:
        print(f"{prefix} is complete already", file=sys.stderr)
        return existing
    if not overwrite:
        for path in (bin_path(prefix), idx_path(prefix), json_path(prefix)):
            if path.exists():
                raise UserError("the output exists already and is of other inputs or options", where=str(path),
                                fix="choose another --output-prefix or give --overwrite")  # fmt: skip
    work = Path(f"{prefix}.work")
    try:
        with _locked(work):
            setup = Setup(str(model.path.resolve()), options.key, ids["<s>"], ids["</s>"],
                          token_dtype(model.vocab_size).str, options.max_document_bytes, options.fail,
                          str(work))  # fmt: skip
            results = _tokenize(units, setup, plan, workers, show_progress)
            metadata = _join(units, results, unread, setup, model, plan, prefix)
        shutil.rmtree(work)
    except OSError as error:
        raise UserError(f"cannot write: {error.strerror or error}", where=str(error.filename or work),
                        fix="free the disk or choose another --output-prefix, then run again to go on") from error  # fmt: skip
    return metadata


def _plan(files: list[Path], unread: list[tuple[Path, Rejected]], model: Tokenizer, options: Options) -> str:
    """Hash of all that decides the bytes. A file counts as changed when its size or time of change is another."""
    described = [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in files]
    missing = [(str(path), outcome.reason) for path, outcome in unread]
    decisive = {**asdict(options), "fail": None}  # whether to stop changes no byte of what is finished
    content = json.dumps([UNIT_FORMAT, described, missing, model.sha256, decisive])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keep a second run for the same output out of the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError("another run is making the same output", where=str(work), fix="wait for it or end it") from error
    finally:
        os.close(descriptor)


def _tokenize(
    units: list[Unit], setup: Setup, plan: str, workers: int, show_progress: bool
) -> dict[int, UnitResult]:
    work = Path(setup.folder)
    plan_file = work / "plan.json"
    try:
        same = json.loads(plan_file.read_bytes()) == {"plan": plan}
    except (OSError, ValueError):
        same = False
    if not same:
        if any(work.glob("unit-*.json")):
            print(f"inputs, options or tokenizer have changed: starting {work} anew", file=sys.stderr)
        remove_unit_files(work)
        write_json(plan_file, {"plan": plan})
    results = {unit.number: found for unit in units if (found := finished_result(work, unit.number)) is not None}
    missing = [unit for unit in units if unit.number not in results]
    if results and missing:
        print(f"going on: {len(results)} of {len(units)} parts are done", file=sys.stderr)
    total = sum(unit.size for unit in units)
    with progress_bar(total=total, initial=total - sum(unit.size for unit in missing), unit="B", unit_scale=True,
                      desc="tokenising", disable=not show_progress) as bar:  # fmt: skip
        for number, result in run_tasks(_WORKER, setup, missing, workers, bar.update):
            results[missing[number].number] = result
            bar.set_postfix(documents=sum(done.documents for done in results.values()),
                            tokens=sum(done.tokens for done in results.values()), refresh=False)  # fmt: skip
    return results


def _join(
    units: list[Unit], results: dict[int, UnitResult], unread: list[tuple[Path, Rejected]], setup: Setup,
    model: Tokenizer, plan: str, prefix: str | Path,
) -> TokenMetadata:  # fmt: skip
    work, dtype = Path(setup.folder), np.dtype(setup.dtype)
    ordered = [results[unit.number] for unit in units]
    rejected = sum((Counter(result.rejected) for result in ordered), Counter(outcome.reason for _, outcome in unread))
    documents, tokens = sum(r.documents for r in ordered), sum(r.tokens for r in ordered)
    records = sum(result.records for result in ordered) + len(unread)
    if documents + rejected.total() != records:
        raise AssertionError(f"{documents} documents and {rejected.total()} rejected are not {records} records")
    if not documents:
        raise UserError(f"no document in {records} records ({_counts(rejected)})", where=setup.key,
                        fix="check --input and --json-key")  # fmt: skip
    joined = work / "joined"
    with atomic_file(bin_path(joined)) as handle:
        for unit, result in zip(units, ordered, strict=True):
            _append(unit_file(work, unit.number, "bin"), handle, result.bin_sha256)
    with atomic_file(idx_path(joined)) as handle:
        write_index(handle, dtype, documents, _Lengths(work, units))
    with atomic_file(rejected_path(joined)) as handle:
        for line in _rejections(units, ordered, unread, work):
            handle.write(line)
    metadata = TokenMetadata(
        vocab_size=model.vocab_size, max_id=max(result.max_id for result in ordered),
        tokenizer_sha256=model.sha256, bos_id=setup.bos_id, eod_id=setup.eod_id, dtype=dtype.name,
        documents=documents, tokens=tokens, text_bytes=sum(result.text_bytes for result in ordered), records=records,
        rejected=dict(sorted(rejected.items())), bin_bytes=bin_path(joined).stat().st_size,
        idx_bytes=idx_path(joined).stat().st_size, bin_sha256=file_sha256(bin_path(joined)),
        idx_sha256=file_sha256(idx_path(joined)), plan=plan,
    )  # fmt: skip
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


def _append(path: Path, handle: object, sha256: str) -> None:
    digest = hashlib.sha256()
    with open(path, "rb") as part:
        while block := part.read(_BLOCK):
            digest.update(block)
            handle.write(block)  # type: ignore[attr-defined]
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
            print(f"rejected: {place}: {reason}: {REASONS[reason]}{detail}".encode("utf-8", "replace").decode(),
                  file=sys.stderr)  # fmt: skip
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
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    index = open_index(prefix)
    dataset = IndexedDataset(str(prefix))
    faithful = (
        len(dataset) == metadata.documents
        and index.tokens == metadata.tokens
        and np.array_equal(dataset.sequence_lengths[-1:], index.lengths[-1:])
        and len(dataset[metadata.documents - 1]) == index.lengths[-1]
        and (metadata.eod_id is None or dataset[metadata.documents - 1][-1] == metadata.eod_id)
    )
    if not faithful:
        raise AssertionError(f"Megatron-Core reads {prefix} differently from what was written")
