"""One start of the trainer as a process of its own, which does not outlive whoever started it."""

from __future__ import annotations

import ctypes
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import dump_recipe
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.windtunnel.cells import Cell

CELL_RECIPE = "cell.yaml"
LOG = "log.txt"
_PARENT_DEATH_SIGNAL = 1  # prctl's PR_SET_PDEATHSIG
_WITH_A_PORT = ("deepspeed", "torchrun")


@dataclass(frozen=True)
class Launcher:
    """How the trainer is started.

    Attributes:
        script: examples/train.py.
        command: what stands before it, for instance ("deepspeed", "--num_gpus", "8"); empty: this Python, one process.
        workers: cells at once on this machine.
        devices: CUDA devices to share out between the workers; empty: every worker sees all.
    """

    script: Path
    command: tuple[str, ...] = ()
    workers: int = 1
    devices: tuple[str, ...] = ()

    @classmethod
    def of(cls, script: Path, command: str, workers: int, devices: str) -> Launcher:
        """From what a user gave.

        Raises:
            UserError: no such command, or devices that do not divide over the workers.
        """
        if workers < 1:
            raise UserError(f"{workers} is no number of workers", where="--workers", fix="give 1 or more")
        try:
            words = tuple(shlex.split(command))
        except ValueError as error:
            raise UserError(f"{error}", where="--launcher") from None
        if words and shutil.which(_beside_python(words[0])) is None:
            raise UserError(f"no command {words[0]!r}", where="--launcher", fix="check its name, or give its path")
        found = tuple(filter(None, devices.split(",")))
        if len(found) % workers:
            raise UserError(
                f"{len(found)} devices do not divide over {workers} workers",
                where="--devices",
                fix="give as many devices to each worker",
            )
        return cls(script, words, workers, found)

    def start(self, cell: Cell, worker: int, trunk: Path | None) -> subprocess.Popen[bytes]:
        """Start the trainer on a cell, whose folder exists; what it says is added to LOG there.

        Args:
            worker: which of the workers runs it, from 0.
            trunk: folder of the run that it branches from.

        Raises:
            UserError: the launcher cannot be started.
        """
        write_bytes(cell.folder / CELL_RECIPE, dump_recipe(cell.recipe).encode())
        branch = () if trunk is None else ("--from", f"{trunk}@{cell.first_step}")
        words = [*self._prefix(), str(self.script), "--recipe", str(cell.folder / CELL_RECIPE), *branch]
        with open(cell.folder / LOG, "ab") as log:
            return self._popen(words, worker, log)

    def _popen(self, words: Sequence[str], worker: int, log: BinaryIO) -> subprocess.Popen[bytes]:
        log.write(f"$ {shlex.join(words)}\n".encode())
        log.flush()
        try:
            return subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment(worker),
                # a group of its own: a Ctrl-C at the terminal is ours to pass on, once
                start_new_session=True,
                preexec_fn=_end_with_the_parent,
            )
        except OSError as error:
            raise UserError(f"cannot be started: {error.strerror}", where=f"--launcher {words[0]}") from None

    def _prefix(self) -> list[str]:
        if not self.command:
            return [sys.executable]
        port: list[str] = []
        if Path(self.command[0]).name in _WITH_A_PORT and not any(
            "port" in word or "rdzv" in word for word in self.command
        ):
            port = ["--master_port", str(_free_port())]
        return [_beside_python(self.command[0]), *self.command[1:], *port]

    def _environment(self, worker: int) -> dict[str, str]:
        environment = dict(os.environ)
        if self.devices:
            share = len(self.devices) // self.workers
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[worker * share : (worker + 1) * share])
        if self.workers > 1:  # or each would take all cores
            cores = len(os.sched_getaffinity(0))
            environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // self.workers)))
        return environment


def ask_to_stop(process: subprocess.Popen[bytes]) -> None:
    """SIGTERM to a started trainer with all its ranks: they save and leave."""
    try:
        os.killpg(process.pid, signal.SIGTERM)
    except ProcessLookupError:
        return


def _beside_python(command: str) -> str:
    """A bare name as the command of this environment, whether that is activated or not, where it has one."""
    beside = Path(sys.executable).with_name(command)
    return str(beside) if Path(command).name == command and beside.exists() else command


def _end_with_the_parent() -> None:
    """Have the kernel send SIGTERM when whoever started us dies, however it does (Linux)."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
