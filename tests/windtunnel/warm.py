"""The trainer without its start: a process that has imported everything forks one trainer for each launch.

`WarmTrainer.launcher` goes to --launcher. It names a small client that stands where the trainer would: it passes its
arguments, its output and its signals on, and ends as the trainer ends.

In the folder of a run a test can leave a file that tells the trainer to do something before update N + 1, once:
`kill-at-N` (SIGKILL), `fail-at-N` (an exception), `poison-at-N` (a loss that is not finite), `sleep-at-N`.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]


class WarmTrainer:
    """The parent of all trainers of a test module; use as a context manager."""

    def __init__(self, scratch: Path) -> None:
        self.socket, self.starts_file = scratch / "warm", scratch / "starts.jsonl"
        client = Path(__file__).with_name("warm_client.py")
        self.launcher = f"python -S -E {client} {self.socket}"
        self.log = open(scratch / "warm.log", "wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.windtunnel.warm", str(self.socket), str(self.starts_file)],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"},
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def __enter__(self) -> WarmTrainer:
        end = time.monotonic() + 120
        while not self.socket.exists():
            assert self.process.poll() is None and time.monotonic() < end, Path(self.log.name).read_text()
            time.sleep(0.05)
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.log.close()

    def starts(self, folder: Path) -> list[dict[str, Any]]:
        """Every trainer that was started on a run below `folder`: "run", "began" and "ended" (monotonic seconds)."""
        lines = self.starts_file.read_text().splitlines() if self.starts_file.exists() else []
        found = [json.loads(line) for line in lines]
        return [each for each in found if Path(each["run"]).is_relative_to(folder)]


def _serve(place: str, starts: str) -> None:
    from tests.training import nano  # imports everything that the trainer needs

    nano.report.finish = lambda folder, recipe: None  # a picture takes longer than the run
    server = socket.socket(socket.AF_UNIX)
    server.bind(place + ".new")
    server.listen(16)
    os.rename(place + ".new", place)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        connection, _ = server.accept()
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            server.close()
            try:
                _attend(connection, starts)
            finally:
                os._exit(0)
        connection.close()


def _attend(connection: socket.socket, starts: str) -> None:
    message, descriptors, _, _ = socket.recv_fds(connection, 1 << 16, 2)
    asked = json.loads(message)
    began = time.monotonic()
    trainer = os.fork()
    if trainer == 0:
        connection.close()
        os.setsid()
        for number, descriptor in enumerate(descriptors, 1):
            os.dup2(descriptor, number)
        os.chdir(asked["cwd"])
        _train(asked["arguments"])
    while True:
        found, status = os.waitpid(trainer, os.WNOHANG)
        if found:
            break
        if select.select([connection], [], [], 0.02)[0]:
            # a client that was killed outright leaves what a killed machine leaves: nothing
            os.kill(trainer, signal.SIGTERM if connection.recv(1) else signal.SIGKILL)
    recipe = Path(asked["cwd"], asked["arguments"][asked["arguments"].index("--recipe") + 1])
    with open(starts, "a") as handle:
        handle.write(json.dumps({"run": str(recipe.parent), "began": began, "ended": time.monotonic()}) + "\n")
    with contextlib.suppress(OSError):
        connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def _train(arguments: list[str]) -> None:
    from minicpm_megatron.cli import entry
    from minicpm_megatron.cli.train import main
    from minicpm_megatron.training.stepping import Stepper
    from tests.training.nano import POISONS, trainer_with

    disturbances: list[Any] = []

    def before_step(stepper: Stepper) -> None:
        run = stepper.run
        for order in ("kill", "fail", "poison", "sleep"):
            path = run.folder / f"{order}-at-{run.step}"
            if path.exists():
                run.checkpointer.wait()  # the test counts on the one before
                path.unlink()
                if order == "kill":
                    os.kill(os.getpid(), signal.SIGKILL)
                if order == "fail":
                    raise RuntimeError("told to fail")
                if order == "poison":
                    disturbances.append(POISONS["loss"])
                if order == "sleep":
                    (run.folder / "asleep").touch()
                    time.sleep(3)

    status: Any = 1
    try:
        entry.run(lambda: main(arguments, trainer_with(before_step, disturbances)))
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(int(status or 0))


if __name__ == "__main__":
    _serve(*sys.argv[1:3])
