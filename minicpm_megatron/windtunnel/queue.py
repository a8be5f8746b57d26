"""Runs the cells of a plan, each once, however many processes on however many machines share the folder.

A process claims a cell by the lock of its folder, which the kernel drops when the process dies. A cell that is
started again goes on from its newest checkpoint. A cell that branches waits for its trunk's checkpoint, not for the
trunk's end.
"""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, BinaryIO, Protocol

from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage import lock
from minicpm_megatron.training.metrics import duration
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell, check_names
from minicpm_megatron.windtunnel.launch import Launcher, ask_to_stop

POLL = 0.5  # seconds between looks at the folder
HEARTBEAT = 60.0  # seconds of silence after which it is said how far things are
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_GIVE_UP = 3  # failures in one start after which a source is asked for no more cells: the fault is not the cells'


class Source(Protocol):
    """Cells that are decided while others run, by whichever process has room; all of one size and length."""

    @property
    def expected(self) -> int:
        """Cells in the end, as far as is known."""

    def cells(self) -> tuple[Cell, ...]:
        """Those decided so far, by any process."""

    def more(self, known: Collection[str]) -> list[Cell]:
        """Cells that are not in `known` (names), one newly decided if there are no others; none where none is due."""


@dataclass
class _Running:
    """A cell that this process runs: its slot, its trainer, and the claim that ends with it."""

    cell: Cell
    worker: int
    process: subprocess.Popen[bytes]
    claim: BinaryIO


@dataclass
class Outcome:
    """How the cells ended.

    Attributes:
        done: names of cells that are done, whoever ran them.
        failed: name -> how, of cells whose trainer ended with an error.
        blocked: names of branches whose trunk has no checkpoint to branch from.
        stopped: by a signal, before all were tried.
    """

    done: list[str] = field(default_factory=list)
    failed: dict[str, progress.Failure] = field(default_factory=dict)
    blocked: list[str] = field(default_factory=list)
    stopped: bool = False


class Queue:
    """The cells of one experiment and who runs them.

    Args:
        cells: trunks before their branches.
        launcher: starts the trainer.
        say: takes a line for the user.
        source: decides on further cells when there is room and none is left to start.
    """

    def __init__(
        self,
        cells: Sequence[Cell],
        launcher: Launcher,
        say: Callable[[str], None] = print,
        source: Source | None = None,
    ) -> None:
        check_names(cells)
        self.cells, self.launcher, self.say, self.source = list(cells), launcher, say, source
        self.by_name = {cell.name: cell for cell in cells}
        self._running: dict[str, _Running] = {}
        self._done: set[str] = set()
        # failures of an earlier start are tried again, those of a process beside us are not
        self._old_failures = {failed.id for cell in cells if (failed := progress.failure(cell))}
        self._signal: str | None = None
        self._waiting = False
        self._gave_up = False
        self._leaving = False  # whether a cell waits for the trainer of a process that died

    def run(self) -> Outcome:
        """Run everything that is left, and wait for what other processes run.

        Raises:
            UserError: the folder cannot be written, holds other cells, or the launcher cannot be started.
        """
        self._done = {cell.name for cell in self.cells if progress.is_done(cell)}
        self._began = self._told = time.monotonic()
        self._flops_before = self._flops_done()
        if self._done:
            self.say(f"{len(self._done)} of {self._expected()} cells are done already")
        with self._signals():
            try:
                while self._signal is None and self._go_on():
                    time.sleep(POLL)
                    if self._running and time.monotonic() - self._told > HEARTBEAT:
                        self._tell(", ".join(self._running), "running")
            finally:
                self._leave()
        return self._outcome()

    def _go_on(self) -> bool:
        """Look at everything once; False when nothing is left that could still happen."""
        for running in list(self._running.values()):
            if running.process.poll() is not None:
                self._ended(running)
        claimed_elsewhere = self._start_what_is_open()
        while self._grow():
            claimed_elsewhere = self._start_what_is_open()
        if not self._running and claimed_elsewhere and not self._waiting:
            self.say("the cells that are left are being run by another process; waiting for it")
        self._waiting = not self._running and claimed_elsewhere
        return bool(self._running) or claimed_elsewhere

    def _start_what_is_open(self) -> bool:
        """Start cells as far as there is room; whether others are left, with us or another process."""
        claimed_elsewhere = self._leaving = False
        for cell in self.cells:
            if cell.name in self._running or not self._is_open(cell):
                continue
            if len(self._running) < self.launcher.workers:
                if not self._start(cell):
                    claimed_elsewhere = not self._seen_done(cell) or claimed_elsewhere
            else:
                claimed_elsewhere = True  # or will be ours as soon as there is room
        return claimed_elsewhere

    def _grow(self) -> bool:
        """Ask the source for cells; whether there are any.

        What a trainer that is still saving has begun is ours in a moment: no other cell is decided without its result.
        """
        if self.source is None or self._leaving or len(self._running) >= self.launcher.workers:
            return False
        if sum(self._new_failure(cell) is not None for cell in self.cells) >= _GIVE_UP:
            if not self._gave_up:
                self.say(f"{_GIVE_UP} runs have failed: no more are decided on before the next start")
            self._gave_up = True
            return False
        found = self.source.more(self.by_name)
        self.cells += found
        self.by_name |= {cell.name: cell for cell in found}
        return bool(found)

    def _seen_done(self, cell: Cell) -> bool:
        if cell.name not in self._done and progress.is_done(cell):
            self._done.add(cell.name)
            self._tell(cell.name, "done elsewhere")
        return cell.name in self._done

    def _is_open(self, cell: Cell) -> bool:
        """Whether the cell is left to do, and neither failed beside us nor can never begin."""
        return not self._seen_done(cell) and self._new_failure(cell) is None and not self._is_blocked(cell)

    def _new_failure(self, cell: Cell) -> progress.Failure | None:
        failed = progress.failure(cell)
        return None if failed is None or failed.id in self._old_failures else failed

    def _is_blocked(self, cell: Cell) -> bool:
        """Whether the trunk has ended without the checkpoint that this cell starts from."""
        trunk = self.by_name.get(cell.trunk or "")
        if trunk is None or progress.can_start(cell, trunk):
            return False
        return trunk.name in self._done or self._new_failure(trunk) is not None

    def _start(self, cell: Cell) -> bool:
        """Claim the cell and start its trainer; False where it is another's, or not its time."""
        trunk = self.by_name.get(cell.trunk or "")
        if not progress.can_start(cell, trunk):
            return False
        claim = lock.hold_if_free(cell.folder)
        if claim is None:
            return False
        # the former holder may have finished it since we looked, or have left a trainer that is still saving
        leaving = _has_a_trainer(cell)
        if leaving or not self._is_open(cell):
            self._leaving = self._leaving or leaving
            claim.close()
            return False
        worker = next(n for n in range(self.launcher.workers) if all(n != r.worker for r in self._running.values()))
        try:
            process = self.launcher.start(cell, worker, trunk.folder if trunk else None)
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(cell.folder)) from None
        self._running[cell.name] = _Running(cell, worker, process, claim)
        step = progress.steps_done(cell)
        self._tell(cell.name, "started" if step == cell.first_step else f"goes on, had come to step {step}")
        return True

    def _ended(self, running: _Running) -> None:
        cell = running.cell
        end = progress.judge_end(cell, running.process.returncode)
        running.claim.close()
        del self._running[cell.name]
        if end == "done":
            self._done.add(cell.name)
            diverged = progress.divergence(cell)
            loss = progress.measured(cell).held_out
            self._tell(cell.name, f"diverged, {diverged}" if diverged else f"done, held-out loss {loss:.4f}")
        elif end == "failed":
            failed = progress.failure(cell)
            assert failed is not None
            self._tell(cell.name, f"FAILED, {failed.reason} (log: {failed.log})")
        elif self._signal is None:  # somebody stopped that trainer and not us: they want its machine
            self._signal = "a trainer that was stopped"

    def _leave(self) -> None:
        """Ask what still runs to save and stop, and wait for it."""
        if not self._running:
            return
        self.say(f"stopping ({self._signal or 'an error'}): {len(self._running)} cells save and leave")
        for running in self._running.values():
            ask_to_stop(running.process)
        for running in list(self._running.values()):
            if running.process.wait() == 0:  # anything else is our doing, and no failure of the cell
                progress.judge_end(running.cell, 0)
            running.claim.close()

    def _outcome(self) -> Outcome:
        outcome = Outcome(stopped=self._signal is not None)
        for cell in self.cells:
            failed = self._new_failure(cell)
            if progress.is_done(cell):
                outcome.done.append(cell.name)
            elif failed is not None:
                outcome.failed[cell.name] = failed
            elif self._is_blocked(cell):
                outcome.blocked.append(cell.name)
        return outcome

    def _flops_done(self) -> float:
        """Of all cells and processes, from what the folders tell."""
        return sum(
            cell.flops() if cell.name in self._done else cell.flops(progress.steps_done(cell)) for cell in self.cells
        )

    def _expected(self) -> int:
        return max(len(self.cells), self.source.expected if self.source else 0)

    def _tell(self, names: str, what: str) -> None:
        self._told = time.monotonic()
        now, elapsed = self._flops_done(), time.monotonic() - self._began
        total = sum(each.flops() for each in self.cells)
        total += (self._expected() - len(self.cells)) * self.cells[0].flops()
        rate = (now - self._flops_before) / elapsed if elapsed else 0.0
        left = f", ETA {duration((total - now) / rate)}" if rate > 0 else ""
        share = f"{now / total:.0%} of the FLOPs" if total else ""
        self.say(f"[{len(self._done)}/{self._expected()} cells, {share}{left}] {names}: {what}")

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: FrameType | None) -> None:
            self._signal = signal.Signals(number).name
            signal.signal(number, previous[number])  # the same again ends us at once, and the trainers after us

        previous: dict[int, Any] = {number: signal.signal(number, stop) for number in STOPPING}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _has_a_trainer(cell: Cell) -> bool:
    """Whether the trainer of a process that died still holds the run: it saves and leaves on its own."""
    directory = cell.folder / CHECKPOINTS
    if not directory.is_dir():
        return False
    try:
        lock.hold(directory).close()
    except UserError:
        return True
    return False
