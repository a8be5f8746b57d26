"""Who runs a cell, and what becomes of one that is killed, fails, diverges or is stopped."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.windtunnel import queue
from minicpm_megatron.windtunnel.cells import make_cell
from minicpm_megatron.windtunnel.launch import Launcher
from minicpm_megatron.windtunnel.queue import Queue
from minicpm_megatron.windtunnel.results import read_results
from tests.cli.commands import ROOT, command, tree
from tests.training import nano
from tests.windtunnel.warm import WarmTrainer

RATES = ("0.002", "0.005", "0.01")
CELLS = [f"mup-32x1-lr{rate}-s1" for rate in RATES]


def arguments(output: str, warm: WarmTrainer, *more: str) -> list[str]:
    given = ["lr", "--recipe", "recipe.yaml", "--output", output, "--sizes", "32x1", "--rates", ",".join(RATES)]
    return [*given, "--parametrizations", "mup", "--launcher", warm.launcher, *more]


def start(output: str, warm: WarmTrainer, *more: str) -> subprocess.Popen[str]:
    """The command as a process of its own."""
    words = [sys.executable, str(ROOT / "tools" / "windtunnel.py"), *arguments(output, warm, *more)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tell(output: Path, cell: str, order: str) -> Path:
    folder = output / "cells" / cell
    folder.mkdir(parents=True, exist_ok=True)
    (folder / order).touch()
    return folder


def numbers(output: Path) -> dict[str, Any]:
    """Everything that the cells have computed: losses of each step and the bits of the last checkpoint."""
    folders = sorted((output / "cells").iterdir())
    return {path.name: (nano.losses(path), nano.tensors(path / "checkpoints" / "step-12")) for path in folders}


def claimed(here: Path, output: str, warm: WarmTrainer) -> Path:
    """The folder of an experiment that has not begun: orders can be left in it."""
    process = start(output, warm)
    while not (here / output / "plan.json").exists():
        time.sleep(0.01)
    process.kill()
    process.communicate()
    return here / output


@pytest.fixture(scope="module")
def undisturbed(sound: Path, warm: WarmTrainer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(sound)
        assert command("windtunnel.py", *arguments(str(folder / "out"), warm)) == 0
    return folder / "out"


def test_two_commands_on_one_folder_share_its_cells(here: Path, undisturbed: Path, warm: WarmTrainer) -> None:
    both = [start("out", warm, "--workers", "2"), start("out", warm)]
    outputs = [process.communicate(timeout=200)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], outputs
    starts = warm.starts(here / "out")
    assert sorted(Path(each["run"]).name for each in starts) == sorted(CELLS)  # each once
    assert numbers(here / "out") == numbers(undisturbed)
    for text in outputs:
        assert "results: out/results.json" in text
    values = {tuple(cell["held_out"] for cell in read_results(path).cells) for path in (here / "out", undisturbed)}
    assert len(values) == 1


def test_a_killed_command_and_a_killed_cell_go_on(here: Path, undisturbed: Path, warm: WarmTrainer) -> None:
    output = claimed(here, "out", warm)
    asleep = tell(output, CELLS[0], "sleep-at-6") / "asleep"
    process = start("out", warm)
    while not asleep.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()  # its trainer is told by the kernel, saves and leaves
    process.communicate()
    folder = tell(output, CELLS[1], "kill-at-6")
    again = start("out", warm)
    text = again.communicate(timeout=200)[0]
    assert again.returncode == 1 and f"failed: {CELLS[1]}: killed by signal 9" in text
    assert f"log: out/cells/{CELLS[1]}/log.txt" in text and not (folder / "done.json").exists()
    assert command("windtunnel.py", *arguments("out", warm)) == 0
    assert not (folder / "failed.json").exists()
    assert numbers(output) == numbers(undisturbed)
    runs = [Path(each["run"]).name for each in warm.starts(output)]
    assert sorted(runs) == sorted([CELLS[0], CELLS[0], CELLS[1], CELLS[1], CELLS[2]])
    intervals = sorted((each["run"], each["began"], each["ended"]) for each in warm.starts(output))
    assert all(b[0] != a[0] or b[1] >= a[2] for a, b in zip(intervals, intervals[1:], strict=False))


def test_a_finished_experiment_starts_nothing(
    undisturbed: Path, here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(undisturbed / "cells")
    assert command("windtunnel.py", *arguments(str(undisturbed), warm)) == 0
    assert "3 of 3 cells are done already" in capsys.readouterr().out
    assert tree(undisturbed / "cells") == before


def test_a_failing_and_a_diverging_cell_do_not_stop_the_others(here: Path, warm: WarmTrainer) -> None:
    output = claimed(here, "out", warm)
    tell(output, CELLS[0], "fail-at-5")
    tell(output, CELLS[2], "poison-at-5")
    process = start("out", warm)
    text = process.communicate(timeout=200)[0]
    assert process.returncode == 1
    assert f"failed: {CELLS[0]}: exit status 1: RuntimeError: told to fail; log: out/cells/{CELLS[0]}/log.txt" in text
    assert "loss was nan in step 6" in text
    states = {cell["name"]: cell["state"] for cell in read_results(output).cells}
    assert states == dict(zip(CELLS, ("failed", "done", "diverged"), strict=True))
    assert f"without 1 of 3 cells: {CELLS[0]}" in text


def test_a_signal_saves_and_the_next_start_goes_on(here: Path, undisturbed: Path, warm: WarmTrainer) -> None:
    output = claimed(here, "out", warm)
    asleep = tell(output, CELLS[1], "sleep-at-6") / "asleep"
    process = start("out", warm, "--workers", "2")
    while not asleep.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    text = process.communicate(timeout=100)[0]
    assert process.returncode == 0 and "stopping (SIGTERM)" in text and "start again to go on" in text
    assert "log:" not in text and not (output / "results.json").exists()
    steps = nano.read_metrics(output / "cells" / CELLS[1] / nano.METRICS)
    assert steps[-1]["step"] == 7
    assert command("windtunnel.py", *arguments("out", warm, "--workers", "2")) == 0
    assert numbers(output) == numbers(undisturbed)


def test_a_branch_waits_for_its_trunk_and_is_blocked_where_that_fails(here: Path, warm: WarmTrainer) -> None:
    base = load_recipe("recipe.yaml")
    stable = {"schedule.decay": 0, "checkpoint.steps": [5], "checkpoint.keep_last": 1}
    trunk = make_cell(base, here / "out", "trunk", stable, {})
    decay = {"schedule.total": 8, "schedule.decay": 3}
    branch = make_cell(base, here / "out", "branch", decay, {}, trunk=trunk, first_step=5)
    tell(here / "out", "trunk", "fail-at-3")
    launcher = Launcher.of(ROOT / "examples" / "train.py", warm.launcher, 2, "")
    said: list[str] = []
    outcome = Queue([trunk, branch], launcher, said.append).run()
    assert (list(outcome.failed), outcome.blocked, outcome.done) == (["trunk"], ["branch"], [])
    tell(here / "out", "trunk", "sleep-at-7")  # the branch runs meanwhile
    outcome = Queue([trunk, branch], launcher, said.append).run()
    assert (outcome.failed, outcome.blocked, outcome.done) == ({}, [], ["trunk", "branch"])
    ends = {Path(each["run"]).name: (each["began"], each["ended"]) for each in warm.starts(here / "out")}
    assert ends["branch"][0] < ends["trunk"][1]
    saved = sorted(path.name for path in (trunk.folder / "checkpoints").glob("step-*"))
    assert saved == ["step-12", "step-5"]
    assert [line[0] for line in nano.losses(branch.folder)][:3] == [6, 7, 8]


def test_another_experiment_in_the_folder_is_refused(
    undisturbed: Path, here: Path, warm: WarmTrainer, capfd: pytest.CaptureFixture[str]
) -> None:
    before = tree(undisturbed)
    for more in (("optimizer.weight_decay=0.2",), ("--seeds", "2"), ("evaluation.batches=2",)):
        assert command("windtunnel.py", *arguments(str(undisturbed), warm, *more)) == 2
        assert "holds another experiment" in capfd.readouterr().err
    assert tree(undisturbed) == before


def test_what_runs_long_is_heard_of(here: Path, warm: WarmTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue, "HEARTBEAT", 0.0)
    cell = make_cell(load_recipe("recipe.yaml"), here / "out", "only", {}, {})
    said: list[str] = []
    assert Queue([cell], Launcher.of(ROOT / "examples" / "train.py", warm.launcher, 1, ""), said.append).run().done
    assert said[0].endswith("] only: started") and said[1].startswith("[0/1 cells, ")
    assert said[1].endswith("] only: running") and "only: done" in said[-1]
