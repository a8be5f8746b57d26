"""Saves that go on while the run trains: the state of their step, whatever happens to the run meanwhile."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.checkpoint import publish
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.stepping import Stepper
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

SLOW = 2.0  # seconds a rank needs to write its file, of which a step needs a hundredth
STAGES = ("0", "3")


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """`nano.train` on a disk that takes case["seconds"] for the file of step case["slow_at"].

    Returns:
        and "during": the steps that were done between the begin and the end of that file.
    """
    write, during, runs = publish.write_fragments, [], []

    def remember(stepper: Stepper) -> None:
        runs[:] = [stepper.run]

    def slow(path: Path, *arguments: Any) -> Any:
        if path.parent.name == f"step-{case['slow_at']}.tmp":
            begun = runs[0].step
            time.sleep(case["seconds"])
            during.append([begun, runs[0].step])
        return write(path, *arguments)

    if "slow_at" in case:
        publish.write_fragments = slow
    return nano.train(rank, case, before_step=remember) | {"during": during}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("async-save")
    recipe = nano.write_recipe(folder, checkpoint={"interval": 5})
    cases: dict[str, dict[str, Any]] = {}
    for stage in STAGES:
        zero = f"deepspeed.zero_stage={stage}"
        cases[f"blocking {stage}"] = nano.case(recipe, f"blocking-{stage}", zero, "checkpoint.async_save=false")
        cases[f"slow {stage}"] = nano.case(recipe, f"slow-{stage}", zero, slow_at=10, seconds=SLOW)
    cut = {"kill_at": 12, "in_save": True, "slow_at": 10, "seconds": 100}
    cases["killed"] = nano.case(recipe, "cut", "deepspeed.zero_stage=0", **cut)
    cases["resumed"] = nano.case(recipe, "cut", "deepspeed.zero_stage=0")
    outcomes = run_forked("tests.training.test_async_save:worker", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


@pytest.mark.parametrize("stage", STAGES)
def test_a_slow_save_holds_the_state_of_its_step_and_training_goes_on(stage: str, jobs: Any) -> None:
    runs, outcomes = jobs
    blocking, slow = runs / f"blocking-{stage}", runs / f"slow-{stage}"
    nano.check(outcomes[f"blocking {stage}"])
    nano.check(outcomes[f"slow {stage}"])
    for rank in outcomes[f"slow {stage}"]:
        ((begun, ended),) = rank.result["during"]
        assert begun >= 10 and ended > begun, "training waited for the disk"
    for step in (5, 10, 15, 20):
        first, second = (run / "checkpoints" / f"step-{step}" for run in (blocking, slow))
        assert len(nano.tensors(first)) == 2 and nano.tensors(first) == nano.tensors(second)
    assert nano.losses(blocking) == nano.losses(slow)


def test_metrics_tell_how_long_training_waited(jobs: Any) -> None:
    runs, _ = jobs
    stalls = {run: read_metrics(runs / run / METRICS, "checkpoint") for run in ("blocking-0", "slow-0")}
    assert all([line["step"] for line in lines] == [5, 10, 15, 20] for lines in stalls.values())
    assert stalls["slow-0"][1]["stall_seconds"] < SLOW, "the copy alone, not the write"


def test_a_rank_killed_while_it_saves_costs_no_more_than_that_save(jobs: Any) -> None:
    runs, outcomes = jobs
    killed = [rank.status for rank in outcomes["killed"]]
    assert killed[1] == -signal.SIGKILL and killed[0]
    nano.check(outcomes["resumed"])
    assert "at step 5" in outcomes["resumed"][0].log
    checkpoints = runs / "cut" / "checkpoints"
    assert not list(checkpoints.glob("*.tmp"))
    for step in (10, 15, 20):
        name = f"step-{step}"
        assert nano.tensors(checkpoints / name) == nano.tensors(runs / "blocking-0" / "checkpoints" / name)
    assert nano.losses(runs / "cut") == nano.losses(runs / "blocking-0")
