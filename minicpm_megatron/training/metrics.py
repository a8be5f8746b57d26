"""What a run tells: one readable line on the console, metrics.jsonl for programs, TensorBoard for eyes.

Only rank 0 writes. metrics.jsonl holds a line for every step ("kind": "train"), every evaluation ("evaluation"), every
checkpoint ("checkpoint"), every step that logging.gradient_statistics asks for ("gradients") and, of a mixture, for the
experts' load every logging.interval steps ("experts"); after a resume the lines of steps that will be done again are
dropped first, so each step stands once. What undid them is told in a line of its own ("event").
"""

from __future__ import annotations

import functools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.storage.atomic import write_bytes

if TYPE_CHECKING:  # that module is slow to import, and most readers of metrics train nothing
    from minicpm_megatron.engine.gradient_statistics import GradientStatistics
    from minicpm_megatron.training.expert_load import LayerLoad

METRICS = "metrics.jsonl"
GRADIENTS = "gradients"  # the kind of line that compares a step's gradient with the next one's
EXPERTS = "experts"  # the kind of line that says how a mixture's experts were used


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step.

    Attributes:
        step: number of the step, from 1.
        tokens: tokens consumed once it is done.
        loss: mean cross-entropy in nats per token over the global batch.
        lr: base rate x schedule factor (the embedding's and the norms' rate).
        gradient_norm: before clipping; None: not known.
        seconds: wall time of the step.
        step_tokens: tokens of the step.
        sequence_length: tokens of the rows that it was fed as.
        skipped: why no update was made; None: it was.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    gradient_norm: float | None
    seconds: float
    step_tokens: int
    sequence_length: int
    skipped: str | None = None


class MetricsLog:
    """Console, JSONL and TensorBoard of one run; use as a context manager.

    Args:
        folder: the run's folder, or None on ranks that do not write.
        recipe: for intervals.
        start, total: steps done so far and steps of the whole run.
        evaluate_again: the evaluation at `start` is due again; drop its lines.
        flops_per_token: FLOPs that a token of rows so long needs.
        peak_flops: FLOP/s of all ranks together.

    Attributes:
        failure: what kept rank 0 from writing; it is raised once all ranks have stopped and saved, not in the middle
            of a step that the other ranks go on with.
    """

    def __init__(
        self,
        folder: Path | None,
        recipe: Recipe,
        *,
        start: int,
        total: int,
        flops_per_token: Callable[[int], float],
        peak_flops: float,
        evaluate_again: bool = False,
    ) -> None:
        self.recipe, self.start, self.total = recipe, start, total
        self.flops_per_token, self.peak_flops = flops_per_token, peak_flops
        self._file: TextIO | None = None
        self._board: Any = None
        self._began = time.monotonic()
        self._tokens = self._seconds = 0.0
        self._steps = 0
        self.failure: UserError | None = None
        if folder is not None:
            self.path = folder / METRICS
            self._open(folder, evaluate_again)

    def _open(self, folder: Path, evaluate_again: bool = False) -> None:
        try:
            self._open_files(folder, evaluate_again)
        except OSError as error:
            self._fail(error)

    def _open_files(self, folder: Path, evaluate_again: bool) -> None:
        truncate_after(self.path, self.start, evaluate_again=evaluate_again)
        self._file = open(self.path, "a", encoding="utf-8")
        if self.recipe.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=self.start + 1)

    def check(self) -> None:
        """Raise `failure`, if there is one."""
        if self.failure is not None:
            raise self.failure

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def _close(self) -> None:
        try:
            if self._file is not None:
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
            if self._board is not None:
                self._board.close()
        except OSError as error:
            self._fail(error)
        self._file = self._board = None

    def rewind(self, step: int) -> None:
        """Drop what was told of the steps after `step`, which will be done again."""
        if self._file is not None:
            self._close()
            self.start = step
            self._open(self.path.parent)

    def event(self, step: int, text: str) -> None:
        """Note what happened to the run when `step` steps were done."""
        if self._file is None:
            return
        self._write("event", step, {"event": text})
        if self._board is not None:
            self._board.add_text("event", text, step)
        print(text, flush=True)

    def step(self, record: StepRecord, memory_bytes: int) -> None:
        """Note one step; a console line every logging.interval steps."""
        if self._file is None:
            return
        rate = record.step_tokens / record.seconds
        achieved = rate * self.flops_per_token(record.sequence_length)
        values: dict[str, float | None] = {
            "loss": _finite(record.loss),
            "lr": record.lr,
            "gradient_norm": _finite(record.gradient_norm),
            "tokens_per_second": rate,
            "model_flops_per_second": achieved,
            "utilisation": achieved / self.peak_flops,
            "memory_bytes": memory_bytes,
            "sequence_length": record.sequence_length,
        }
        skipped = {"skipped": True, "cause": record.skipped} if record.skipped else {}
        self._write("train", record.step, {"tokens": record.tokens, "seconds": record.seconds, **values, **skipped})
        self._scalars("train", record.step, values)
        self._tokens += record.step_tokens
        self._seconds += record.seconds
        self._steps += 1
        if record.skipped:
            print(f"skipped: {record.skipped}", flush=True)
        elif record.step % self.recipe.logging.interval == 0 or record.step in (self.start + 1, self.total):
            print(self._line(record, memory_bytes), flush=True)
            self._tokens = self._seconds = 0.0
            self._steps = 0

    def evaluation(self, step: int, tokens: int, results: Mapping[str, Mapping[str, float | None]]) -> None:
        """Note the losses on every held-out set: name -> {"loss_per_token", "loss_per_byte"} in nats, None: unknown."""
        if self._file is None or not results:
            return
        for name, values in results.items():
            self._write("evaluation", step, {"set": name, "tokens": tokens, **values})
            self._scalars(f"evaluation/{name}", step, values)
        parts = [
            f"{name} {values['loss_per_token']:.4f}"
            + ("" if values["loss_per_byte"] is None else f" ({values['loss_per_byte']:.4f}/byte)")
            for name, values in results.items()
        ]
        print(f"evaluation at step {step}, nats per token: " + ", ".join(parts), flush=True)

    def experts(self, step: int, loads: Sequence[LayerLoad]) -> None:
        """Note how the experts of each layer were used since the last time."""
        if self._file is None or not loads:
            return
        self._write(EXPERTS, step, {"layers": [asdict(load) for load in loads]})
        for load in loads:
            values = {f"share_{expert}": share for expert, share in enumerate(load.share)}
            values |= {name: value for name, value in asdict(load).items() if name not in ("layer", "share")}
            self._scalars(f"experts/layer_{load.layer:03}", step, values)

    def gradients(self, step: int, found: GradientStatistics) -> None:
        """Note what the gradient of `step` is beside the next one."""
        if self._file is None:
            return
        sums = found.sums
        values = {
            "gradient_norm": sums.gradient_norm,
            "max_gradient": found.max_gradient,
            "gradient_cosine": sums.gradient_cosine,
            "first_derivative": sums.first_derivative,
            "second_derivative": sums.second_derivative,
            "curvature": sums.curvature,
            "update_norm": sums.update_norm,
        }
        written = {name: _finite(value) for name, value in values.items()}
        self._write(GRADIENTS, step, written)
        self._scalars(GRADIENTS, step, written)

    def saved(self, step: int, stall: float) -> None:
        """Note a checkpoint, and the seconds that training waited for it."""
        values = {"stall_seconds": stall}
        self._write("checkpoint", step, values)
        self._scalars("checkpoint", step, values)

    def _line(self, record: StepRecord, memory_bytes: int) -> str:
        norm = math.nan if record.gradient_norm is None else record.gradient_norm
        rate = self._tokens / self._seconds
        achieved = rate * self.flops_per_token(record.sequence_length)
        left = (self.total - record.step) * self._seconds / self._steps
        return (
            f"step {record.step:>{len(str(self.total))}}/{self.total} | loss {record.loss:.4f} | lr {record.lr:.2e} | "
            f"grad {norm:.3f} | {human(record.tokens)} tokens | {rate:,.0f} tokens/s | "
            f"{human(achieved)}FLOP/s ({achieved / self.peak_flops:.0%}) | {memory_bytes / 2**30:.2f} GiB | "
            f"ETA {duration(left)}"
        )

    def _write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._file is None or self.failure is not None:
            return
        try:
            self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
            self._file.flush()
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        self.failure = self.failure or UserError(
            f"cannot write metrics: {error.strerror}",
            where=str(self.path),
            fix="free some space and start again; the run goes on from its newest checkpoint",
        )

    def _scalars(self, prefix: str, step: int, values: Mapping[str, float | None]) -> None:
        if self._board is None or self.failure is not None:
            return
        try:
            for name, value in values.items():
                if value is not None:
                    self._board.add_scalar(f"{prefix}/{name}", value, step)
        except OSError as error:
            self._fail(error)


def _finite(value: float | None) -> float | None:
    """What JSON has numbers for."""
    return value if value is not None and math.isfinite(value) else None


def read_metrics(path: Path, kind: str = "train", needs: Collection[str] = ()) -> list[dict[str, Any]]:
    """Return the lines of one kind in a metrics.jsonl, in order.

    A line that is no metrics line, for instance since a bit of it flipped, is left out and named once on standard
    error. A last line that a kill cut short is left out without a word.

    Args:
        path: the file; there need not be one.
        kind: of the lines.
        needs: keys that the caller reads besides "kind" and "step". A line without one of them is no metrics line.
    """
    if not path.exists():
        return []
    return [record for record, _ in _lines(path, {kind: needs}) if record["kind"] == kind]


def parse_line(line: bytes, needs: Mapping[str, Collection[str]] | None = None) -> dict[str, Any] | None:
    """Return a line of metrics.jsonl as a dict with "kind" (str) and "step" (int, 0 or more), or None if it is none.

    Args:
        line: without its end.
        needs: kind -> keys that a line of it must have: a text for "set", a number or null for any other.
    """
    try:
        record = json.loads(line)
        kind, step = record["kind"], record["step"]
        if not isinstance(kind, str) or type(step) is not int or step < 0:
            return None
        return record if all(_fits(key, record[key]) for key in (needs or {}).get(kind, ())) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _fits(key: str, value: Any) -> bool:
    return isinstance(value, str) if key == "set" else value is None or type(value) in (int, float)


def _lines(path: Path, needs: Mapping[str, Collection[str]] | None = None) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Yield (record, line) of every metrics line; name the others, but for a last one without an end."""
    *whole, rest = path.read_bytes().split(b"\n")  # in bytes, since a flipped bit makes text that is not UTF-8
    for number, line in enumerate([*whole, rest], start=1):
        record = parse_line(line, needs)
        if record is not None:
            yield record, line
        elif number <= len(whole):
            _name(f"{path}:{number}: not a metrics line, left out")


@functools.cache  # a command reads the file several times
def _name(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def truncate_after(path: Path, step: int, *, evaluate_again: bool = False) -> None:
    """Drop the lines of steps after `step` (the evaluation at it, too), and those that are no metrics lines."""
    if not path.exists():
        return
    kept = [
        line
        for record, line in _lines(path)
        if record["step"] < step + (record["kind"] != "evaluation" or not evaluate_again)
    ]
    write_bytes(path, b"".join(line + b"\n" for line in kept))


def human(value: float) -> str:
    """1234567 -> '1.23 M'."""
    for limit, unit in ((1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= limit:
            return f"{value / limit:.3g}{unit}"
    return f"{value:.3g} "


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
