"""Whole runs with observers beside the usual ones: their state, their failures and a copy at every save."""

from __future__ import annotations

import json
import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minicpm_megatron.convert.operation import convert
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.observer import Observer, RunInfo, StepRecord
from minicpm_megatron.training.stepping import Stepper
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

STANDARD = "metrics-jsonl, console"
FAILS_AT = 5


class Counting(Observer):
    """Counts steps over all ranks, and keeps the counts over starts."""

    everywhere = True

    def __init__(self, recipe: Recipe) -> None:
        self.counts: list[int] = []

    def on_start(self, run: RunInfo) -> None:
        self.run = run

    def on_step(self, record: StepRecord) -> None:
        ranks = torch.ones(())
        dist.all_reduce(ranks)
        self.counts.append(record.step * int(ranks))

    def on_end(self) -> None:
        if self.run.rank == 0:
            (self.run.folder / "counts.json").write_text(json.dumps(self.counts))

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = state["counts"]


class FailingOnOneRank(Counting):
    """Fails on rank 1 alone, after its collective."""

    def on_step(self, record: StepRecord) -> None:
        super().on_step(record)
        if self.run.rank == 1 and record.step == FAILS_AT:
            raise OSError("this rank's disk")

    def on_end(self) -> None:
        pass


OBSERVERS = {"counting": Counting, "failing": FailingOnOneRank}


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """`nano.train` with the observers case["observers"] beside the recipe's.

    Args:
        case: "kill_in_copy": rank 0 does not survive the copy of the checkpoint of that step; "nan_at": the step whose
            loss is nan the first time.
    """
    if rank == 0 and "kill_in_copy" in case:
        from minicpm_megatron.convert import operation

        write = operation.write_weights

        def killed(folder: Path, *arguments: Any) -> None:
            if folder.name == f"step-{case['kill_in_copy']}.part":
                os.kill(os.getpid(), signal.SIGKILL)
            write(folder, *arguments)

        operation.write_weights = killed  # type: ignore[assignment]
    broken = [case.get("nan_at")]
    now: list[int] = []

    def before_step(stepper: Stepper) -> None:
        broken[:] = [step for step in broken if step not in now]  # it is broken once
        now[:] = [stepper.run.step + 1]

    def disturbed(losses: torch.Tensor) -> torch.Tensor:
        return losses * math.nan if now == broken else losses

    observers = {name: OBSERVERS[name] for name in case["observers"]}
    return nano.train(rank, case, before_step=before_step, on_losses=disturbed, observers=observers)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("observed")
    recipe = nano.write_recipe(folder, checkpoint={"interval": 5, "keep_last": 2})
    copies = f"logging.observers=[{STANDARD}, hf-copy]"
    cases = {
        "plain": nano.case(recipe, "plain", observers=[]),
        "whole": nano.case(recipe, "whole", copies, observers=["counting", "failing"]),
        "back": nano.case(recipe, "back", "faults.non_finite=rollback", observers=["counting"], nan_at=13),
        "killed": nano.case(recipe, "cut", copies, observers=["counting"], kill_at=13),
        "resumed": nano.case(recipe, "cut", copies, observers=["counting"], kill_in_copy=15),
        "resumed again": nano.case(recipe, "cut", copies, observers=["counting"]),
    }
    outcomes = run_forked(f"{__name__}:worker", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


def test_observers_that_fail_or_count_change_no_number(jobs: Any) -> None:
    runs, outcomes = jobs
    for name in ("plain", "whole"):
        nano.check(outcomes[name])
    assert nano.losses(runs / "plain") == nano.losses(runs / "whole")
    plain, whole = (nano.tensors(runs / name / "checkpoints" / "step-20") for name in ("plain", "whole"))
    assert plain == whole
    assert "observers" not in nano.state(runs / "plain" / "checkpoints" / "step-20"), "the usual ones keep nothing"


def test_one_that_fails_on_one_rank_is_left_out_on_all(jobs: Any) -> None:
    runs, outcomes = jobs
    first, second = (rank.log for rank in outcomes["whole"])
    assert second.count("note: the observer failing is left out from here on: OSError: this rank's disk\n") == 1
    assert "is left out" not in first
    # rank 0's state is that of the last save before
    states = nano.state(runs / "whole" / "checkpoints" / "step-20")["observers"]
    assert "failing" not in states and states["counting"]["counts"] == [2 * step for step in range(1, 21)]


def test_state_survives_kills_and_resumes(jobs: Any) -> None:
    runs, outcomes = jobs
    for name in ("killed", "resumed"):
        assert -signal.SIGKILL in [rank.status for rank in outcomes[name]]
    nano.check(outcomes["resumed again"])
    assert (runs / "cut" / "counts.json").read_text() == (runs / "whole" / "counts.json").read_text()
    assert nano.losses(runs / "cut") == nano.losses(runs / "whole")


def test_a_rollback_takes_the_state_back(jobs: Any) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["back"])
    assert "rolled back to step 10" in outcomes["back"][0].log
    assert (runs / "back" / "counts.json").read_text() == (runs / "whole" / "counts.json").read_text()


def test_every_checkpoint_has_its_copy(jobs: Any, tmp_path: Path) -> None:
    runs, outcomes = jobs
    assert "Hugging Face copy of" in outcomes["whole"][0].log
    for run in ("whole", "cut"):
        assert {path.name for path in (runs / run / "huggingface").iterdir()} == {"step-15", "step-20"}
        for step in (15, 20):
            checkpoint, copy = runs / run / "checkpoints" / f"step-{step}", runs / run / "huggingface" / f"step-{step}"
            convert(checkpoint, tmp_path / run / str(step), "llama", dtype="fp32")
            wanted = {path.name: path.read_bytes() for path in (tmp_path / run / str(step)).iterdir()}
            assert {path.name: path.read_bytes() for path in copy.iterdir()} == wanted


def test_a_copy_that_a_kill_cut_short_is_made_by_the_next_start(jobs: Any) -> None:
    runs, outcomes = jobs
    log = outcomes["resumed again"][0].log
    assert "at step 15" in log
    assert log.count(f"Hugging Face copy of {runs / 'cut' / 'checkpoints' / 'step-15'}: ") == 1
