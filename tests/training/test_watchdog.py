"""Ranks that wait for each other for ever: the run ends, the culprit is named, and the run goes on bit for bit."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minicpm_megatron.training.watchdog import EXIT_HANG, Watchdog, report
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

PATIENCE = "training.hang_timeout=8"


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("watchdog")
    recipe = nano.write_recipe(folder, checkpoint={"interval": 4}, evaluation={"interval": None})
    stop = "training.stop_after=8"
    cases = {
        "whole": nano.case(recipe, "whole", stop),
        "busy": nano.case(recipe, "busy", stop, PATIENCE, hang_at=6, hang="sleep"),
        "busy again": nano.case(recipe, "busy", stop),
        "stopped": nano.case(recipe, "stopped", stop, PATIENCE, hang_at=6, hang="stop"),
        "stopped first": nano.case(recipe, "first", stop, PATIENCE, hang_at=6, hang="stop", hang_rank=0),
    }
    outcomes = run_forked("tests.training.nano:train", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


def test_a_rank_that_is_busy_with_something_else_is_named(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    assert [rank.status for rank in outcomes["busy"]] == [EXIT_HANG, EXIT_HANG]
    log = outcomes["busy"][0].log
    assert log.count("error: ") == 1 and "error: no progress for 8 s" in log
    assert "is in no collective: step 6, in _hang (" in log and "nano.py:" in log
    assert "rank 0 waits in all_reduce: step 7" in log
    nano.check(outcomes["busy again"])
    whole, again = (runs / name / "checkpoints" / "step-8" for name in ("whole", "busy"))
    assert nano.tensors(whole) == nano.tensors(again)
    assert nano.losses(runs / "whole") == nano.losses(runs / "busy")


@pytest.mark.parametrize(("job", "culprit"), [("stopped", 1), ("stopped first", 0)])
def test_a_rank_that_does_not_answer_is_named(
    job: str, culprit: int, jobs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    _, outcomes = jobs
    statuses = [rank.status for rank in outcomes[job]]
    assert statuses[culprit] == -signal.SIGKILL and statuses[1 - culprit] == EXIT_HANG
    assert f"rank {culprit} does not answer" in outcomes[job][1 - culprit].log


def test_the_report_puts_the_culprits_first() -> None:
    waits = {"doing": "step 3", "host": "a", "collective": "all_reduce", "place": "wait (x.py:1)"}
    busy = {"doing": "step 2", "host": "b", "collective": None, "place": "read (y.py:7)"}
    lines = report({0: waits, 1: busy, 2: waits, 3: {}}, 60).splitlines()
    assert lines == [
        "error: no progress for 60 s; the run is ended, start it again to go on",
        "  rank 3 does not answer: its process is stopped or gone",
        "  rank 1 on b is in no collective: step 2, in read (y.py:7)",
        "  ranks 0, 2 wait in all_reduce: step 3",
    ]
    assert "not in the same one" in report({0: waits, 1: {**waits, "collective": "barrier"}}, 60)


def wait_for_the_device(_: torch.Tensor) -> None:
    """Stands for torch.cuda.synchronize: blocks outside of torch.distributed, as a rank does under NCCL."""
    time.sleep(60)


def launch_and_return(rank: int, case: dict[str, Any]) -> None:
    """Collectives that return at once, as NCCL's do; the rank `case["hang_rank"]` stops before the last of them."""
    everyone = dist.new_group(group_desc="DATA_PARALLEL_GROUP")
    numbers = torch.ones(2)
    works = [dist.all_reduce(numbers.clone(), group=everyone, async_op=True) for _ in range(3)]
    for work in works:
        work.wait()
    with Watchdog(Path(case["folder"]), rank=rank, size=2, timeout=2.0) as watchdog:
        watchdog.tick("step 5")
        if rank != case["hang_rank"]:
            works.append(dist.all_reduce(numbers, group=everyone, async_op=True))
        wait_for_the_device(numbers)


@pytest.mark.parametrize("culprit", [0, 1])
def test_a_rank_is_named_where_collectives_return_at_once(culprit: int, tmp_path: Path) -> None:
    case = {"folder": str(tmp_path), "hang_rank": culprit}
    (outcome,) = run_forked("tests.training.test_watchdog:launch_and_return", [case])
    assert [rank.status for rank in outcome] == [EXIT_HANG, EXIT_HANG]
    log = outcome[0].log
    named = [line for line in log.splitlines() if "is in no collective" in line]
    assert len(named) == 1 and f"rank {culprit} on" in named[0], log
    assert "of DATA_PARALLEL_GROUP it has launched 3 collectives where another rank has launched 4" in named[0]
    assert f"rank {1 - culprit} waits for its device, and has launched what the others have: step 5" in log


def load_and_meet(rank: int, case: dict[str, Any]) -> None:
    """The rank `case["slow"]` loads for longer than the other one waits for it, and makes progress all the time."""
    with Watchdog(Path(case["folder"]), rank=rank, size=2, timeout=2.0) as watchdog:
        watchdog.tick("start-up: waiting for ranks that still load, to write the run's files")
        end = time.monotonic() + 10 * (rank == case["slow"])
        while time.monotonic() < end:
            watchdog.tick("loading weight")
            time.sleep(0.1)
        if rank != case["slow"]:
            dist.barrier()


def test_a_rank_that_still_loads_is_named(tmp_path: Path) -> None:
    cases = [{"folder": str(tmp_path / str(slow)), "slow": slow} for slow in (0, 1)]
    for slow, outcome in enumerate(run_forked("tests.training.test_watchdog:load_and_meet", cases)):
        assert outcome[1 - slow].status == EXIT_HANG
        [named] = [line for line in outcome[1 - slow].log.splitlines() if f"rank {slow} " in line]
        assert "is in no collective: loading weight, in load_and_meet (" in named
        waits = f"rank {1 - slow} waits in barrier: start-up: waiting for ranks that still load"
        assert waits in outcome[1 - slow].log


def test_ranks_that_have_launched_the_same_are_all_named() -> None:
    entry = {"doing": "step 3", "host": "a", "collective": None, "place": "synchronize (x.py:1)"}
    found = {rank: entry | {"launched": {"0": ["default_pg", 7]}} for rank in range(2)}
    assert report(found, 60).count("is in no collective") == 2
