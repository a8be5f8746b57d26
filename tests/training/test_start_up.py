"""Starts that come to nothing under the real launchers: the launcher dies, a rank is stopped, before the first step."""

from __future__ import annotations

import contextlib
import os
import signal
from pathlib import Path

import psutil
import pytest

from minicpm_megatron.training.watchdog import EXIT_HANG
from tests.training import nano
from tests.training.launched import Job

pytestmark = [pytest.mark.timeout(600), pytest.mark.cpu_only("two ranks over gloo")]

TORCHRUN = ("torchrun", "--nproc_per_node", "2")
DEEPSPEED = ("deepspeed", "--num_accelerators", "2")


def started(folder: Path, launcher: tuple[str, ...], *overrides: str) -> Job:
    """A job whose rank 1 is stopped before it has met rank 0, so that no step can be done."""
    recipe = nano.write_recipe(folder)
    job = Job(folder / "runs" / "x", ["--recipe", str(recipe), "name=x", *overrides], launcher)
    job.start()
    os.kill(job.rank(1), signal.SIGSTOP)
    return job


@pytest.mark.parametrize("launcher", [DEEPSPEED, TORCHRUN], ids=["deepspeed", "torchrun"])
def test_no_rank_outlives_a_launcher_that_dies_before_the_first_step(launcher: tuple[str, ...], tmp_path: Path) -> None:
    job = started(tmp_path, launcher)
    second = job.rank(1)
    # the command first, and of deepspeed then the launcher of this node, at whose death the command would end by itself
    for process in reversed([each for each in psutil.Process(second).parents() if each in job.family]):
        process.kill()
    os.kill(second, signal.SIGCONT)
    assert job.end() == -signal.SIGKILL
    assert job.log().count("error: the launcher died before the first step") == 1, job.log()
    assert "Traceback" not in job.log()
    assert not list((tmp_path / "runs" / "x").rglob("step-*"))


def test_a_rank_that_is_stopped_before_the_first_step_is_named(tmp_path: Path) -> None:
    hang = tmp_path / "runs" / "x" / "hang-rank-1.json"
    hang.parent.mkdir(parents=True)
    hang.write_text('{"doing": "of another start", "collective": null, "host": "h", "place": "p", "launched": {}}')
    job = started(tmp_path, TORCHRUN, "training.hang_timeout=6")
    second = psutil.Process(job.rank(1))
    job.say("rank 1 does not answer: its process is stopped or gone")
    with contextlib.suppress(psutil.NoSuchProcess):
        second.kill()  # a stopped process cannot end itself
    assert job.end() == EXIT_HANG
    assert "error: no progress for 6 s; the run is ended, start it again to go on" in job.log()
    assert ": start-up: meeting the other ranks" in job.log()
    assert "of another start" not in job.log()
