"""Ranks killed in the middle of a step, of a save, and of the save that SIGTERM asked for: no number shows it."""

from __future__ import annotations

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.training.stepping import Stepper
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano
from tests.training.launched import Job

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

TOTAL, INTERVAL = 60, 5
# where a rank dies -> the checkpoint that is the newest then
KILLED = {"step": 10, "save": 10, "grace": 10}


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """`nano.train` on which SIGKILL falls in the middle of step 13, of the save after step 15, or of the one that
    SIGTERM in step 13 asked for."""
    where, now = case.get("where"), {"step": 0, "micro_batch": 0}

    def die(dies: bool) -> None:
        if dies:
            os.kill(os.getpid(), signal.SIGKILL)

    def before_step(stepper: Stepper) -> None:
        run = stepper.run
        now["step"], now["micro_batch"] = run.step + 1, 0
        if where == "save" and run.step + 1 == 15:
            run.checkpointer.on_phase = lambda phase: die(rank == 1 and phase == "write")
        if where == "grace" and run.step + 1 == 13:
            os.kill(os.getpid(), signal.SIGTERM)
            run.checkpointer.on_phase = lambda phase: die(phase == "written")  # a scheduler kills all

    def before_the_second_backward(losses: torch.Tensor) -> torch.Tensor:
        now["micro_batch"] += 1
        die(where == "step" and rank == 0 and (now["step"], now["micro_batch"]) == (13, 2))
        return losses

    return nano.train(rank, case, before_step=before_step, on_losses=before_the_second_backward)


def _restarted(arguments: list[str], run: Path) -> str:
    """One torchrun that starts its ranks again by itself, after one of them has died in a save."""
    job = Job(run, arguments, ("torchrun", "--nproc_per_node", "2", "--max-restarts", "1"))
    job.reach(INTERVAL)
    job.saved()  # a rank that dies in the first save leaves nothing to resume from
    os.kill(job.hold_in_save(1), signal.SIGKILL)
    assert job.end() == 0, job.log()
    return job.log()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, dict[str, list[Outcome]]]:
    """(folder of the runs, what torchrun said, outcomes of forked runs)."""
    folder = tmp_path_factory.mktemp("killed")
    recipe = nano.write_recipe(
        folder,
        schedule={"total": TOTAL, "decay": TOTAL // 2},
        evaluation={"interval": 10},
        checkpoint={"interval": INTERVAL},
    )
    cases = {"whole": nano.case(recipe, "whole")}
    for where in KILLED:
        # what is killed in the middle of an asynchronous save is the business of test_async_save.py
        blocking = ["training.stop_after=20", "checkpoint.async_save=false"]
        cases[where] = nano.case(recipe, where, *blocking, where=where)
        cases[f"{where} again"] = nano.case(recipe, where, *blocking)
    with ThreadPoolExecutor() as pool:
        forked = pool.submit(run_forked, "tests.training.test_killed:worker", list(cases.values()))
        said = _restarted(["--recipe", str(recipe), "name=restarted"], folder / "runs" / "restarted")
        return folder / "runs", said, dict(zip(cases, forked.result(), strict=True))


def _same(first: Path, second: Path, step: int) -> None:
    """Both runs came to `step` with the same weights, moments, random state and losses."""
    tensors = [nano.tensors(run / "checkpoints" / f"step-{step}") for run in (first, second)]
    assert tensors[0] == tensors[1] and len(tensors[0]) == 2
    losses = [[record for record in nano.losses(run) if record[0] <= step] for run in (first, second)]
    assert losses[0] == losses[1] and len(losses[0]) == step + step // 10


@pytest.mark.parametrize("where", KILLED)
def test_a_kill_anywhere_is_made_up_for(where: str, runs: Any) -> None:
    folder, _, outcomes = runs
    nano.check(outcomes["whole"])
    statuses = [rank.status for rank in outcomes[where]]
    assert -signal.SIGKILL in statuses and 0 not in statuses
    assert all("checkpoint saved" not in rank.log for rank in outcomes[where])
    nano.check(outcomes[f"{where} again"])
    assert f"at step {KILLED[where]}\n" in outcomes[f"{where} again"][0].log
    _same(folder / "whole", folder / where, 20)


def test_torchrun_starts_the_ranks_again_by_itself(runs: Any) -> None:
    folder, said, _ = runs
    assert said.count("resuming from") == 1, said
    _same(folder / "whole", folder / "restarted", TOTAL)
