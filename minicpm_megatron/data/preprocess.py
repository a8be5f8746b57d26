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
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from minicpm_megatron.data.corpus_files import find_files, segments
from minicpm_megatron.data.indexed_format import bin_path, idx_path, token_dtype
from minicpm_megatron.data.join_units import join_units
from minicpm_megatron.data.metadata import TokenMetadata, data_fingerprint, json_path, read_metadata
from minicpm_megatron.data.progress import progress_bar
from minicpm_megatron.data.records import Rejected
from minicpm_megatron.data.tokenize_units import (
    Setup,
    Unit,
    UnitResult,
    finished_result,
    make_units,
    remove_unit_files,
)
from minicpm_megatron.data.tokenizers import Tokenizer, load_tokenizer
from minicpm_megatron.data.worker_pool import run_tasks
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json

UNIT_FORMAT = 1
"""Raised when the same plan would give other bytes than before."""
_PLAN_NAME = "plan.json"
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
        validation_share: of the documents, to be left for validation; `tokenize_units.in_validation` says which.
        validation: take those documents, and not the others.
    """

    key: str = "text"
    prepend_bos: bool = True
    append_eod: bool = True
    max_document_bytes: int = 64 << 20
    fail: bool = False
    validation_share: float = 0.0
    validation: bool = False


def preprocess(
    inputs: list[str],
    tokenizer: str | Path,
    prefix: str | Path,
    *,
    workers: int = 1,
    options: Options | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> TokenMetadata:
    """Tokenise `inputs` into PREFIX.bin, PREFIX.idx, PREFIX.rejected.jsonl and PREFIX.json.

    Args:
        inputs: files or folders in any supported format.
        tokenizer: folder of any kind, or the file that its kind has.
        prefix: path without suffix; its folder is made.
        workers: processes that tokenise.
        overwrite: replace tokens of another plan that stand at `prefix`.

    Returns:
        What PREFIX.json holds.

    Raises:
        UserError: the input, tokenizer or output cannot be used; with `options.fail`, a record was rejected.
    """
    options = options or Options()
    if Path(prefix).is_dir():
        raise UserError(
            "is a folder, not a path without suffix", where=str(prefix), fix="add a name to --output-prefix"
        )
    if workers < 1:
        raise UserError(f"{workers} workers cannot do it", where="--workers", fix="give 1 or more")
    if not 1 <= options.max_document_bytes <= 1 << 30:
        raise UserError(
            f"{options.max_document_bytes} is out of range", where="--max-document-bytes", fix="give 1 to 1073741824"
        )
    if not 0 <= options.validation_share < 1:
        raise UserError(
            f"{options.validation_share:g} is no share",
            where="--validation-share",
            fix="give 0.01 for one in a hundred",
        )
    model = load_tokenizer(tokenizer)
    ids = {"<s>": model.bos_id if options.prepend_bos else None, "</s>": model.eos_id if options.append_eod else None}
    for (name, index), without in zip(ids.items(), ("--no-prepend-bos", "--no-append-eod"), strict=True):
        if index is not None and index < 0:
            raise UserError(
                f"the tokenizer has no {name}", where=str(model.path), fix=f"give {without}, or another tokenizer"
            )
    files, unread = find_files(inputs)
    if unread and options.fail:
        path, outcome = unread[0]
        raise UserError(f"record rejected ({outcome.reason})", where=str(path), fix="mend it or give --on-error skip")
    units = make_units([segment for file in files for segment in segments(file)])
    plan = _plan(files, unread, model, options)

    work = Path(f"{prefix}.work")
    existing = read_metadata(prefix) if not overwrite else None
    same = existing is not None and existing.plan == plan
    if existing is not None and same and _is_whole(prefix):
        if options.fail and existing.rejected:
            raise UserError(
                f"made with {sum(existing.rejected.values())} records rejected",
                where=str(json_path(prefix)),
                fix="mend them or give --on-error skip",
            )
        print(f"{prefix} is complete already", file=sys.stderr)
        shutil.rmtree(work, ignore_errors=True)
        return existing
    # a run of this plan that was killed while it published its files has left some of them
    if not overwrite and not same and not _is_of_plan(work, plan):
        for path in (bin_path(prefix), idx_path(prefix), json_path(prefix)):
            if path.exists():
                raise UserError(
                    "the output exists already and is of other inputs or options",
                    where=str(path),
                    fix="choose another --output-prefix or give --overwrite",
                )
    try:
        with _locked(work):
            setup = Setup(
                str(model.path.absolute()),  # not resolved: a link into a cache has a name that says no kind
                options.key,
                ids["<s>"],
                ids["</s>"],
                token_dtype(model.vocab_size).str,
                options.max_document_bytes,
                options.fail,
                str(work),
                options.validation_share,
                options.validation,
            )
            results = _tokenize(units, setup, plan, workers, show_progress)
            if _plan(files, unread, model, options) != plan:
                raise UserError("an input has changed while it was read", where=", ".join(inputs), fix="run again")
            try:
                metadata = join_units(
                    units, [results[unit.number] for unit in units], unread, setup, model, plan, prefix
                )
            except UserError:
                if not any(result.documents for result in results.values()):
                    shutil.rmtree(work)  # nothing is left of the input that another start could go on from
                raise
        shutil.rmtree(work)
    except OSError as error:
        raise UserError(
            f"cannot write: {error.strerror or error}",
            where=str(error.filename or work),
            fix="free the disk or choose another --output-prefix, then run again to go on",
        ) from error
    return metadata


def _plan(files: list[Path], unread: list[tuple[Path, Rejected]], model: Tokenizer, options: Options) -> str:
    """Hash of all that decides the bytes. A file counts as changed when its size or time of change is another."""
    described = [(str(path), (status := path.stat()).st_size, status.st_mtime_ns) for path in files]
    missing = [(str(path), outcome.reason) for path, outcome in unread]
    decisive = {**asdict(options), "fail": None}  # whether to stop changes no byte of what is finished
    if not options.validation_share:  # what was made before there was such a share is of the same plan
        del decisive["validation_share"], decisive["validation"]
    else:
        decisive["validation_hash"] = "blake2b"  # it was SHA-256 before, which put other documents aside
    content = json.dumps([UNIT_FORMAT, described, missing, model.sha256, decisive])
    return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()


def _is_whole(prefix: str | Path) -> bool:
    try:
        data_fingerprint(prefix)
    except UserError:
        return False
    return True


def _is_of_plan(work: Path, plan: str) -> bool:
    try:
        return bool(json.loads((work / _PLAN_NAME).read_bytes()) == {"plan": plan})
    except (OSError, ValueError, RecursionError):
        return False


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Keep a second run for the same output out of the work folder."""
    work.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    except BlockingIOError as error:
        raise UserError(
            "another run is making the same output", where=str(work), fix="wait for it or end it"
        ) from error
    finally:
        os.close(descriptor)


def _tokenize(units: list[Unit], setup: Setup, plan: str, workers: int, show_progress: bool) -> dict[int, UnitResult]:
    work = Path(setup.folder)
    if not _is_of_plan(work, plan):
        if any(work.glob("unit-*.json")):
            print(f"inputs, options or tokenizer have changed: starting {work} anew", file=sys.stderr)
        remove_unit_files(work)
        write_json(work / _PLAN_NAME, {"plan": plan})
    results = {unit.number: found for unit in units if (found := finished_result(setup, unit.number)) is not None}
    missing = [unit for unit in units if unit.number not in results]
    if results and missing:
        print(f"going on: {len(results)} of {len(units)} parts are done", file=sys.stderr)
    total = sum(unit.size for unit in units)
    with progress_bar(
        total=total,
        initial=total - sum(unit.size for unit in missing),
        unit="B",
        unit_scale=True,
        desc="tokenising",
        disable=not show_progress,
    ) as bar:
        documents, tokens = (sum(getattr(done, name) for done in results.values()) for name in ("documents", "tokens"))
        # closed, so that an interrupt ends the workers before the lock is given up
        with contextlib.closing(run_tasks(_WORKER, setup, missing, workers, bar.update)) as finished:
            for number, result in finished:
                results[missing[number].number] = result
                documents, tokens = documents + result.documents, tokens + result.tokens
                bar.set_postfix_str(f"{documents:,} documents, {tokens:,} tokens", refresh=False)
    return results
