"""The trainer without its start: each launch is a fork of a process that has imported what the trainer needs.

`WarmTrainer.launcher` goes to --launcher. It names a small script that stands where the trainer would
(tests/processes/stand_in.py).

In the folder of a run a test can leave a file that tells the trainer to do something before update N + 1, once:
`kill-at-N` (SIGKILL), `fail-at-N` (an exception), `poison-at-N` (a loss that is not finite), `sleep-at-N`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from tests.processes import client


class WarmTrainer:
    """The trainers of a test session."""

    def __init__(self, scratch: Path) -> None:
        self.journal = scratch / "starts.jsonl"

    @property
    def launcher(self) -> str:
        """What stands before the script's name on a command line."""
        server = client.importing("tests.training.nano")
        stand_in = Path(client.__file__).with_name("stand_in.py")
        return f"python -S -E {stand_in} {server.place} {self.journal} tests.windtunnel.warm:train"

    def starts(self, folder: Path) -> list[dict[str, Any]]:
        """Every trainer that was started on a run below `folder`: "run", "began" and "ended" (monotonic seconds)."""
        lines = self.journal.read_text().splitlines() if self.journal.exists() else []
        found = []
        for line in map(json.loads, lines):
            words = line["arguments"]["arguments"]
            run = Path(line["cwd"], words[words.index("--recipe") + 1]).parent
            found.append({"run": str(run), "began": line["began"], "ended": line["ended"]})
        return [each for each in found if Path(each["run"]).is_relative_to(folder)]


def train(arguments: list[str]) -> None:
    """What stands for `python examples/train.py ARGUMENTS`."""
    from minicpm_megatron.cli import entry
    from minicpm_megatron.cli.train import main
    from minicpm_megatron.training import report
    from minicpm_megatron.training.stepping import Stepper
    from tests.training.nano import POISONS, trainer_with

    report.finish = lambda folder, recipe: None  # a picture takes longer than the run
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

    entry.run(lambda: main(arguments, trainer_with(before_step, disturbances)))
