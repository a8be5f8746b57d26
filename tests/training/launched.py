"""Runs under the real `deepspeed` command, to be interrupted and killed from outside."""

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

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE = 240.0  # seconds that a hang may last before the test fails


class Job:
    """One start of the command on two ranks.

    Args:
        run: the run's folder.
        arguments: of examples/train.py.
    """

    def __init__(self, run: Path, arguments: list[str]) -> None:
        self.run, self.output = run, run.with_suffix(".log")
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.begins = self.output.stat().st_size if self.output.exists() else 0
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        deepspeed = Path(sys.executable).with_name("deepspeed")
        with open(self.output, "ab") as output:
            self.process = subprocess.Popen(
                [deepspeed, "--num_accelerators", "2", "--master_port", str(port), "examples/train.py", *arguments],
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

    def reach(self, step: int) -> None:
        """Wait until the metrics say that `step` is done, then note every process of the job."""
        end = time.monotonic() + PATIENCE
        while not any(record["step"] >= step for record in read_metrics(self.run / METRICS)):
            assert time.monotonic() < end and self.process.poll() is None, self.log()
            time.sleep(0.01)
        parent = psutil.Process(self.process.pid)
        self.family = [parent, *parent.children(recursive=True)]

    def rank(self, number: int) -> int:
        """Process id of a rank."""
        return next(process.pid for process in self.family if f"--local_rank={number}" in process.cmdline())

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
