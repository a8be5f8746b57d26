"""Ranks that wait for each other for ever: the run ends, the culprit is named, and the run goes on bit for bit."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from minicpm_megatron.training.watchdog import EXIT_HANG, report
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
