"""How far a cell is, read from its folder: what any process on any machine sees alike."""

from __future__ import annotations

import json
import math
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.checkpoint.names import published_steps, step_folder
from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.storage.manifest import MANIFEST, read_manifest
from minicpm_megatron.training.metrics import METRICS, parse_line, read_metrics
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.launch import LOG

DONE = "done.json"
FAILED = "failed.json"
_TAIL = 1 << 16  # bytes of metrics.jsonl that hold its last line


@dataclass(frozen=True)
class Failure:
    """A cell whose trainer ended with an error.

    Attributes:
        id: another for each failure.
        reason: the last line that the trainer said.
        log: where it said the rest.
    """

    id: str
    reason: str
    log: str


def is_done(cell: Cell) -> bool:
    """Whether nothing is left to do: it has reached its last step, or diverged.

    Raises:
        UserError: what is done there is something else.
    """
    content = _read(cell.folder / DONE)
    if content is None:
        return False
    if content.get("fingerprint") != cell.fingerprint:
        raise UserError("holds a cell of something else", where=str(cell.folder), fix="give another --output")
    return True


def divergence(cell: Cell) -> str | None:
    """Why a cell that is done did not reach its last step; None where it did."""
    found = (_read(cell.folder / DONE) or {}).get("diverged")
    return None if found is None else str(found)


def is_whole(cell: Cell) -> bool:
    """Whether it has reached its last step.

    Raises:
        UserError: what is done there is something else.
    """
    return is_done(cell) and divergence(cell) is None


def judge_end(cell: Cell, status: int) -> Literal["done", "stopped", "failed"]:
    """What the end of a cell's trainer means; writes it into the cell's folder, whose lock the caller holds.

    A step that was not finite is a result, as the end of a sweep's range: the cell is done, and says so.
    """
    folder, checkpoints = cell.folder, cell.folder / CHECKPOINTS
    steps = published_steps(checkpoints)
    if status == 0 and steps and steps[-1] >= cell.last_step:
        return _write_done(cell, steps[-1], None)
    if status == 0:
        return "stopped"
    fault = None
    if steps:
        newest = step_folder(checkpoints, steps[-1])
        try:
            fault = RunState.of(read_manifest(newest), str(newest / MANIFEST)).fault
        except UserError:
            fault = None
    if fault:
        return _write_done(cell, steps[-1], f"{fault.what} was {fault.value} in step {fault.step}")
    failure = {"id": uuid.uuid4().hex, "status": status, "reason": _last_words(folder / LOG, status)}
    write_json(folder / FAILED, failure)
    return "failed"


def mark_done(cell: Cell) -> None:
    """Note that a cell is done that the trainer did not run; the caller holds its lock."""
    _write_done(cell, cell.last_step, None)


def _write_done(cell: Cell, step: int, diverged: str | None) -> Literal["done"]:
    write_json(cell.folder / DONE, {"fingerprint": cell.fingerprint, "step": step, "diverged": diverged})
    (cell.folder / FAILED).unlink(missing_ok=True)
    return "done"


def failure(cell: Cell) -> Failure | None:
    """How the cell ended the last time, where that was an error."""
    content = _read(cell.folder / FAILED)
    if content is None:
        return None
    return Failure(str(content.get("id")), str(content.get("reason")), str(cell.folder / LOG))


def can_start(cell: Cell, trunk: Cell | None) -> bool:
    """Whether the checkpoint that the cell starts from is there."""
    if trunk is None or published_steps(cell.folder / CHECKPOINTS):
        return True
    return (step_folder(trunk.folder / CHECKPOINTS, cell.first_step) / MANIFEST).is_file()


def steps_done(cell: Cell) -> int:
    """The last step of which the metrics tell, or the first one of a cell that has not begun."""
    path = cell.folder / METRICS
    try:
        with open(path, "rb") as handle:
            handle.seek(max(0, path.stat().st_size - _TAIL))
            lines = handle.read().splitlines()
    except OSError:
        return cell.first_step
    for line in reversed(lines):
        record = parse_line(line)
        if record is not None:
            return max(cell.first_step, int(record["step"]))
    return cell.first_step


@dataclass(frozen=True)
class Measured:
    """What a cell's metrics say.

    Attributes:
        held_out: mean over the held-out sets of the loss at the last evaluation, nats per token; nan where there is
            none, or the run diverged.
        per_set: the same of each set.
        seconds: in steps.
        flops_per_second: of those steps.
    """

    held_out: float
    per_set: dict[str, float]
    seconds: float
    flops_per_second: float


def measured(cell: Cell, step: int | None = None) -> Measured:
    """What is known of a cell, at its last evaluation or at that of `step`."""
    evaluations = read_metrics(cell.folder / METRICS, "evaluation", ("set", "loss_per_token"))
    wanted = cell.last_step if step is None else step
    per_set = {record["set"]: record["loss_per_token"] for record in evaluations if record["step"] == wanted}
    seconds = sum(record["seconds"] for record in read_metrics(cell.folder / METRICS, needs=("seconds",)))
    diverged = divergence(cell) is not None or not per_set
    return Measured(
        held_out=math.nan if diverged else sum(per_set.values()) / len(per_set),
        per_set=per_set,
        seconds=seconds,
        flops_per_second=cell.flops(steps_done(cell)) / seconds if seconds else math.nan,
    )


def per_byte(cell: Cell) -> dict[str, float]:
    """Held-out loss of every set at the cell's last step, nats per byte; empty where it was not reached.

    Sets whose bytes were not known are left out.
    """
    if not is_whole(cell):
        return {}
    records = read_metrics(cell.folder / METRICS, "evaluation", ("set", "loss_per_byte"))
    last = (record for record in records if record["step"] == cell.last_step)
    return {record["set"]: record["loss_per_byte"] for record in last if record["loss_per_byte"] is not None}


def evaluations(cell: Cell) -> list[tuple[int, float]]:
    """(step, mean held-out loss in nats per token) of every evaluation, in order."""
    by_step: dict[int, list[float]] = {}
    for record in read_metrics(cell.folder / METRICS, "evaluation", ("loss_per_token",)):
        by_step.setdefault(record["step"], []).append(record["loss_per_token"])
    return [(step, sum(losses) / len(losses)) for step, losses in sorted(by_step.items())]


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _last_words(path: Path, status: int) -> str:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    begin = max((number for number, line in enumerate(lines) if line.startswith("$ ")), default=0)
    said = [line.strip() for line in lines[begin + 1 :] if line.strip()]
    errors = [line for line in said if line.startswith(("error:", "stopped:"))]
    ended = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
    return f"{ended}: {(errors or said or ['it said nothing'])[-1][:300]}"
