"""Runs under the real `deepspeed` and `torchrun` commands, to be interrupted and killed from outside."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil

from minicpm_megatron.training.metrics import METRICS, read_metrics
from tests.device import need

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds that a hang may last before the test fails


class Job:
    """One start of the command on two ranks.

    Args:
        run: the run's folder.
        arguments: of examples/train.py.
        launcher: the command and its own arguments besides the port.
    """

    def __init__(
        self, run: Path, arguments: list[str], launcher: tuple[str, ...] = ("deepspeed", "--num_accelerators", "2")
    ) -> None:
        need(2)
        self.run, self.output = run, run.with_suffix(".log")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.begins = self.output.stat().st_size if self.output.exists() else 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        command = [Path(sys.executable).with_name(launcher[0]), *launcher[1:], "--master_port", str(port)]
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [*command, "examples/train.py", *arguments],
                cwd=REPOSITORY,
                env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.family: list[psutil.Process] = []

    def log(self) -> str:
        """What this start has written."""
        return self.output.read_bytes()[self.begins :].decode(errors="replace")

    def start(self) -> None:
        """Wait until both ranks are processes, which is long before their first step."""
        end = time.monotonic() + PATIENCE
        while not all(any(_is_rank(process, number) for process in self.family) for number in range(2)):
            assert time.monotonic() < end and self.process.poll() is None, self.log()
            time.sleep(0.01)
            self._meet()

    def say(self, text: str) -> None:
        """Wait until the job has written `text`."""
        end = time.monotonic() + PATIENCE
        while text not in self.log():
            assert time.monotonic() < end, self.log()
            time.sleep(0.05)

    def reach(self, step: int) -> None:
        """Wait until the metrics say that `step` is done, then note every process of the job."""
        end = time.monotonic() + PATIENCE
        while not any(record["step"] >= step for record in read_metrics(self.run / METRICS)):
            assert time.monotonic() < end and self.process.poll() is None, self.log()
            time.sleep(0.01)
        self._meet()

    def saved(self) -> None:
        """Wait until a checkpoint is whole: an asynchronous save ends some steps after it began."""
        end = time.monotonic() + PATIENCE
        while all(folder.suffix == ".tmp" for folder in (self.run / "checkpoints").glob("step-*")):
            assert time.monotonic() < end and self.process.poll() is None, self.log()
            time.sleep(0.01)

    def _meet(self) -> None:
        parent = psutil.Process(self.process.pid)
        now = [parent, *parent.children(recursive=True)]
        self.family = [*now, *(process for process in self.family if process not in now)]

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        return next(process.pid for process in self.family if _is_rank(process, number))

    def hold_in_save(self, number: int) -> int:
        """Stop a rank in the middle of the next save, which then goes on for none; returns its process id.

        Seen from outside by the folder of a save under way, which stays while the others wait for the rank.
        """
        saves, rank, end = self.run / "checkpoints", self.rank(number), time.monotonic() + PATIENCE
        while True:
            assert time.monotonic() < end and self.process.poll() is None, self.log()
            if any(saves.glob("step-*.tmp")):
                os.kill(rank, signal.SIGSTOP)
                time.sleep(0.2)  # the others come to where they wait for it
                if any(saves.glob("step-*.tmp")):
                    return rank
                os.kill(rank, signal.SIGCONT)  # too late for this save
            time.sleep(0.0005)

    def signal_group(self, number: signal.Signals) -> None:
        """What a terminal does on Ctrl-C."""
        os.killpg(self.process.pid, number)

    def end(self) -> int:
        """Wait until every process of the job has gone, and return the command's exit status."""
        try:
            status = self.process.wait(PATIENCE)
            _, left = psutil.wait_procs(self.family[1:], timeout=PATIENCE)
            assert not left, f"orphans: {left}\n{self.log()}"
            return status
        finally:
            for process in [self.process, *self.family]:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue


def _is_rank(process: psutil.Process, number: int) -> bool:
    try:
        return process.is_running() and process.environ().get("RANK") == str(number)
    except psutil.Error:  # gone, or another attempt's
        return False
