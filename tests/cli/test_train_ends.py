"""examples/train.py at its end: what follows the last checkpoint, and a start that would end before it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import ROOT, command, error_lines
from tests.training import nano


def train(recipe: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    """One process whose terminal knows ASCII alone."""
    return subprocess.run(
        [sys.executable, "examples/train.py", "--recipe", str(recipe), *overrides],
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "DS_ACCELERATOR": "cpu"},
        capture_output=True,
        text=True,
        timeout=180,
    )


def test_a_finished_run_ends_0_and_is_left_alone_by_one_that_ends_before(tmp_path: Path) -> None:
    recipe = nano.write_recipe(tmp_path, run={"directory": str(tmp_path / "L\xe4ufe")}, schedule={"decay": 0})
    run = tmp_path / "L\xe4ufe" / "x"
    (run / "loss.png").mkdir(parents=True)
    done = train(recipe, "name=x", "schedule.total=5")
    assert done.returncode == 0, done.stderr
    (note,) = (line for line in done.stderr.splitlines() if line.startswith("note: "))
    assert "loss.png could not be drawn (IsADirectoryError" in note and "Traceback" not in done.stderr
    assert f"metrics: {tmp_path}/L\\xe4ufe/x/metrics.jsonl" in done.stdout, "with what the terminal has no letter for"

    written = (run / "recipe.yaml").read_bytes()
    again = train(recipe, "name=x", "schedule.total=4")
    assert again.returncode == 2
    (error,) = error_lines(again.stderr)
    assert error.startswith("error: schedule.total: ends the run after step 4, and 5 steps are already done; ")
    assert (run / "recipe.yaml").read_bytes() == written


def test_finished_is_asked_of_the_newest_checkpoint(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = nano.write_recipe(tmp_path)
    ask = ("train.py", "--recipe", recipe, "name=x", "--finished")
    run = tmp_path / "runs" / "x"
    for folder, status, done in (("step-10", 1, 10), ("step-20.tmp", 1, 10), ("step-20", 0, 20)):
        (run / "checkpoints" / folder).mkdir(parents=True)
        assert command(*ask) == status
        assert f"{run}: {done} of 20 steps are done\n" in capfd.readouterr().out
    assert command(*ask, "training.stop_after=30", "schedule.total=40") == 1
    assert command(*ask, "training.stop_after=10") == 0
