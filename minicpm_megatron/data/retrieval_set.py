"""Sets of retrieval questions on disk: one JSON Lines file for each length and depth, and what they are.

Each file appears whole or not at all, and `set.json` last. A build that was interrupted goes on after the last file
that is there; where it asks for other files than those that are there, it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.data.haystack import Haystack
from minicpm_megatron.data.progress import progress_bar
from minicpm_megatron.data.retrieval import TASKS, Sample, build_sample
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import atomic_file, write_json
from minicpm_megatron.storage.claim import PLAN, claim

SET = "set.json"
MAX_CORPUS_BYTES = 64 << 20
"""Text of the corpus that is read; more would make no better padding."""
_FIELDS = {"id": str, "task": str, "length": int, "depth": (int, float), "context": str, "question": str, "answer": str}


@dataclass(frozen=True)
class Plan:
    """What is in a set.

    Attributes:
        lengths: tokens of <s>, prompt and answer.
        depths: percent of the text before what is hidden.
        samples: of each length and depth.
    """

    task: str
    lengths: tuple[int, ...]
    depths: tuple[float, ...]
    samples: int
    seed: int

    def __post_init__(self) -> None:
        faults = {
            "--task": (self.task in TASKS, f"unknown task {self.task!r}", f"give one of {', '.join(TASKS)}"),
            "--lengths": (
                bool(self.lengths) and min(self.lengths) > 0 and len(set(self.lengths)) == len(self.lengths),
                "not a list of different numbers of tokens",
                "for example 256,1024,4096",
            ),
            "--depths": (
                bool(self.depths)
                and all(0 <= depth <= 100 for depth in self.depths)
                and len(set(self.depths)) == len(self.depths),
                "not a list of different percentages",
                "for example 0,25,50,75,100",
            ),
            "--samples": (self.samples > 0, f"{self.samples} is not a number of samples", "give at least 1"),
        }
        for option, (holds, what, fix) in faults.items():
            if not holds:
                raise UserError(what, where=option, fix=fix)

    def cells(self) -> list[tuple[int, float]]:
        """(length, depth) in order."""
        return [(length, depth) for length in sorted(self.lengths) for depth in sorted(self.depths)]


def cell_name(length: int, depth: float) -> str:
    """File of a cell."""
    return f"length-{length}-depth-{depth:g}.jsonl"


def build_set(plan: Plan, haystack: Haystack, output: Path, *, show_progress: bool = True) -> int:
    """Write the set, or what is missing of it.

    Args:
        output: a folder; made if need be.

    Returns:
        Files that were there already.

    Raises:
        UserError: `output` holds something else, or a length cannot be met.
    """
    described = _described(plan, haystack)
    length, depth = plan.cells()[0]
    build_sample(plan.task, haystack, length=length, depth=depth, number=0, seed=plan.seed)  # or nothing is written
    claim(output, described, "holds another set")
    found, number = 0, 0
    with progress_bar(total=plan.samples * len(plan.cells()), unit=" samples", disable=not show_progress) as bar:
        for length, depth in plan.cells():
            path = output / cell_name(length, depth)
            if path.exists():
                found += 1
            else:
                _write(path, _samples(plan, haystack, length, depth, bar.update))
            number += plan.samples
            bar.update(number - bar.n)
    write_json(output / SET, described | {"files": [cell_name(*cell) for cell in plan.cells()]})
    return found


def write_training_text(
    plan: Plan, haystack: Haystack, prefix: Path, *, samples: int, show_progress: bool = True
) -> Path:
    """PREFIX.jsonl: questions with their answers as documents that minicpm preprocess reads.

    Never a sample of the set: other draws, and for qa other sentences; lengths and depths come in turn, so that any
    part of the file has all of them. PREFIX.retrieval.json says what they are; where it says the same, the file stays.

    Args:
        samples: of each length and depth.

    Raises:
        UserError: another file is there already, or a length cannot be met.
    """
    path, facts = (prefix.with_name(prefix.name + suffix) for suffix in (".jsonl", ".retrieval.json"))
    described = _described(plan, haystack) | {"samples": samples}
    if path.exists():
        if facts.is_file() and _read_json(facts) == described:
            return path
        raise UserError("exists already", where=str(path), fix="remove it, or give another --train-prefix")
    cells = plan.cells()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(facts, described)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from None
    with progress_bar(total=samples * len(cells), unit=" documents", disable=not show_progress) as bar:
        with atomic_file(path) as handle:
            for number in range(samples):
                for length, depth in cells:
                    sample = build_sample(
                        plan.task, haystack, length=length, depth=depth, number=number, seed=plan.seed, training=True
                    )
                    handle.write(json.dumps({"text": sample.text}, ensure_ascii=False).encode() + b"\n")
                    bar.update()
    return path


def _samples(plan: Plan, haystack: Haystack, length: int, depth: float, report: Any) -> Iterator[Sample]:
    for number in range(plan.samples):
        yield build_sample(plan.task, haystack, length=length, depth=depth, number=number, seed=plan.seed)
        report()


def _described(plan: Plan, haystack: Haystack) -> dict[str, Any]:
    """Everything that decides the bytes of the set, as JSON values."""
    fields: dict[str, Any] = json.loads(json.dumps(asdict(plan)))
    return fields | {"tokenizer_sha256": haystack.tokenizer.sha256, "sentences_sha256": haystack.sha256}


def _write(path: Path, samples: Iterator[Sample]) -> None:
    with atomic_file(path) as handle:
        for sample in samples:
            handle.write(json.dumps(asdict(sample), ensure_ascii=False).encode() + b"\n")


@dataclass(frozen=True)
class RetrievalSet:
    """A finished set.

    Attributes:
        task: one of `TASKS`, or whatever another program named it.
        tokenizer_sha256: of the tokenizer that the lengths were counted with.
        cells: (length, depth) -> its file.
    """

    folder: Path
    task: str
    tokenizer_sha256: str
    cells: Mapping[tuple[int, float], Path]


def open_set(folder: Path) -> RetrievalSet:
    """The set in a folder; its samples are read later.

    Raises:
        UserError: there is none, or it was not finished.
    """
    if not (folder / SET).is_file():
        fix = "run minicpm build-retrieval-set again" if (folder / PLAN).is_file() else "give its --output"
        raise UserError("no finished set", where=str(folder), fix=fix)
    content = _read_json(folder / SET)
    try:
        lengths, depths = tuple(content["lengths"]), tuple(content["depths"])
        counts = (*lengths, content["samples"], content["seed"])
        if any(type(count) is not int for count in counts) or any(type(depth) not in (int, float) for depth in depths):
            raise TypeError("a number is of another type")
        plan = Plan(content["task"], lengths, depths, content["samples"], content["seed"])
        identity = str(content["tokenizer_sha256"])
    except UserError as error:
        raise UserError(error.what, where=str(folder / SET), fix="build the set again") from None
    except (KeyError, TypeError) as error:
        raise UserError(f"not the description of a set: {error}", where=str(folder / SET)) from None
    cells = {cell: folder / cell_name(*cell) for cell in plan.cells()}
    for path in cells.values():
        if not path.is_file():
            raise UserError("missing from the set", where=str(path), fix="build the set again")
    return RetrievalSet(folder, plan.task, identity, cells)


def read_samples(path: Path) -> list[Sample]:
    """The samples of one file.

    Raises:
        UserError: a line is no sample.
    """
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        where = f"{path}:{number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError("not a JSON value", where=where, fix="build the set again") from None
        if not isinstance(fields, dict) or set(fields) != set(_FIELDS):
            raise UserError(f"not an object of {', '.join(_FIELDS)}", where=where, fix="build the set again")
        for name, kind in _FIELDS.items():
            if not isinstance(fields[name], kind) or isinstance(fields[name], bool):  # type: ignore[arg-type]
                raise UserError(f"{name} is {fields[name]!r:.60}", where=where, fix="build the set again")
        found.append(Sample(**fields))
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise UserError("not a JSON object", where=str(path), fix="build the set again") from None
    if not isinstance(content, dict):
        raise UserError("not a JSON object", where=str(path), fix="build the set again")
    return content
