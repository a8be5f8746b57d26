"""Runs under the deepspeed launcher that are interrupted, killed, damaged and started again: none of it shows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.training.metrics import METRICS, read_metrics
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano
from tests.training.launched import Job

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

TOTAL = 60
WORKER = "tests.training.test_signals:signalled"
STAGES = {"first": ["deepspeed.zero_stage=1"], "third": ["deepspeed.zero_stage=3", "training.precision=bf16"]}

GUARDED = """
import sys, time
from minicpm_megatron.training.guards import SignalGuard
from minicpm_megatron.training.launcher import Launcher
guard = SignalGuard(Launcher())
print("ready", flush=True)
while True:
    time.sleep(0.05)
    if guard.requested():
        print(guard.received, flush=True)
        guard.received = None
"""


def signalled(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """A run of which rank 1 gets a signal in the middle of a step, as from a scheduler that knows one process."""
    count = 0

    def with_signal(losses: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        if rank == 1 and count == case.get("backward"):
            os.kill(os.getpid(), signal.Signals[case["signal"]])
        return losses

    return nano.train(rank, case, on_losses=with_signal)


def _last_step(run: Path) -> int:
    return max(record["step"] for record in read_metrics(run / METRICS))


def _steps(run: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step-*") if path.name[5:].isdecimal())


def _first(arguments: list[str], run: Path) -> list[str]:
    """Ctrl-C, the command's death, a rank's death, and a checkpoint that is damaged then. Returns what was said."""
    said = []
    job = Job(run, arguments)
    job.reach(4)
    job.signal_group(signal.SIGINT)
    job.end()
    assert _steps(run)[-1] == _last_step(run) < 20, job.log()
    said.append(job.log())

    job = Job(run, arguments)
    job.reach(_last_step(run) + 4)
    job.process.terminate()  # the front end, which passes nothing on
    assert job.end() == -signal.SIGTERM
    assert _steps(run)[-1] == _last_step(run) < TOTAL - 20, job.log()
    said.append(job.log())

    job = Job(run, arguments)
    job.reach(_last_step(run) + 14)
    os.kill(job.rank(0), signal.SIGKILL)
    assert job.end() not in (0, 2)
    said.append(job.log())

    newest = run / "checkpoints" / f"step-{_steps(run)[-1]}" / "rank-00001.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    return said


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict[str, list[Outcome]]]:
    """(folder of the runs, what launched jobs on the first of them said, outcomes of forked ones)."""
    folder = tmp_path_factory.mktemp("signals")
    schedule = {"total": TOTAL, "decay": TOTAL // 2}
    recipe = nano.write_recipe(folder, schedule=schedule, evaluation={"interval": 10}, checkpoint={"interval": 10})
    cases = {f"whole-{name}": nano.case(recipe, f"whole-{name}", *stage) for name, stage in STAGES.items()}
    for name in ("SIGTERM", "SIGUSR1"):
        stop = nano.case(recipe, name, "schedule.total=24", "schedule.decay=10", signal=name, backward=19)
        cases[name] = stop
        cases[f"{name} again"] = stop | {"backward": None}
    cases["short"] = nano.case(recipe, "short", "schedule.total=24", "schedule.decay=10", backward=None)
    third = nano.case(recipe, "third", *STAGES["third"])
    cases |= {"killed": third | {"kill_at": 14, "kill_rank": 1}, "third": third}
    first = nano.case(recipe, "first", *STAGES["first"])
    on_first = {
        "damaged": first,
        "first": nano.case(recipe, "first", *STAGES["first"], "checkpoint.on_corrupt=previous"),
    }
    with ThreadPoolExecutor() as pool:
        forked = pool.submit(run_forked, WORKER, list(cases.values()))
        said = _first(["--recipe", str(recipe), "name=first", *STAGES["first"]], folder / "runs" / "first")
        outcomes = dict(zip(cases, forked.result(), strict=True))
    # the last starts on what the launched jobs have left
    outcomes |= zip(on_first, run_forked(WORKER, list(on_first.values())), strict=True)
    return folder / "runs", said, outcomes


@pytest.mark.parametrize("name", STAGES)
def test_what_was_done_to_a_run_does_not_show(name: str, runs: Any) -> None:
    folder, _, outcomes = runs
    nano.check(outcomes[f"whole-{name}"])
    nano.check(outcomes[name])
    undisturbed, disturbed = folder / f"whole-{name}", folder / name
    first, second = (run / "checkpoints" / f"step-{TOTAL}" for run in (undisturbed, disturbed))
    assert nano.tensors(first) == nano.tensors(second)
    assert nano.losses(undisturbed) == nano.losses(disturbed)
    assert not any("Traceback" in rank.log for rank in outcomes[name])


def test_the_third_was_killed_on_the_way(runs: Any) -> None:
    _, _, outcomes = runs
    statuses = [rank.status for rank in outcomes["killed"]]
    assert statuses[1] == -signal.SIGKILL and statuses[0] not in (0, 2)
    assert outcomes["third"][0].log.count("resuming from") == 1


def test_every_start_says_what_happened_to_it(runs: Any) -> None:
    folder, (interrupted, orphaned, killed), outcomes = runs
    nano.check(outcomes["damaged"], 2, 2)
    damaged, mended = (outcomes[name][0].log for name in ("damaged", "first"))
    for text, cause in ((interrupted, "SIGINT"), (orphaned, "the launcher's death")):
        assert text.count("stopped after step") == 1 and f"by {cause}; checkpoint saved" in text
    for text in (orphaned, killed, mended):
        assert text.count("resuming from") == 1
    errors = [line for line in damaged.splitlines() if "error: " in line]
    assert len(errors) == 1 and "rank-00001.safetensors: the checksum is not that of what was written" in errors[0]
    assert "Traceback" not in damaged and "step 1/" not in damaged
    assert len(list((folder / "first" / "checkpoints").glob("*.corrupt"))) == 1


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_stops_all_at_the_same_step(name: str, runs: Any) -> None:
    folder, _, outcomes = runs
    nano.check(outcomes[name])
    assert "stopped after step 10 by another rank" in outcomes[name][0].log
    assert [len(rank.result["samples"]) for rank in outcomes[name]] == [10, 10]
    nano.check(outcomes[f"{name} again"])
    assert "at step 10" in outcomes[f"{name} again"][0].log
    first, second = (folder / run / "checkpoints" / "step-24" for run in (name, "short"))
    assert nano.tensors(first) == nano.tensors(second)
    assert nano.losses(folder / name) == nano.losses(folder / "short"), "the evaluation that was due was made up for"


def test_only_the_same_signal_again_aborts() -> None:
    process = subprocess.Popen([sys.executable, "-c", GUARDED], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        # a launcher passes one Ctrl-C on as two signals, and a terminal may repeat it at once
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGINT):
            process.send_signal(number)
        assert process.stdout.readline() == "SIGINT\n" and process.poll() is None
        time.sleep(1.2)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
