"""Runs whose disk fails them or damages what it holds: one line, status 2 on every rank, and nothing lost."""

from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.checkpoint import checkpointer
from minicpm_megatron.training.metrics import METRICS
from minicpm_megatron.training.stepping import Stepper
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

DISK = "size=6m"  # two checkpoints of 1.2 MB and what goes with them, not three and the reserve of a save


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """`nano.train` on a disk that fails this rank's checkpoint, or rank 0's metrics, after a while."""
    publish = checkpointer.publish
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def limited_publish(directory: Path, saved: int, *arguments: Any, **keywords: Any) -> Path:
        if rank == 1 and saved == case["limit_at"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
        try:
            return publish(directory, saved, *arguments, **keywords)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def fill(stepper: Stepper) -> None:
        if rank == 0 and stepper.run.step + 1 == case.get("metrics_full_at"):
            open_files = ((int(each.name), os.path.realpath(each)) for each in Path("/proc/self/fd").iterdir())
            (metrics,) = (number for number, path in open_files if path == str(stepper.run.folder / METRICS))
            with open("/dev/full", "a") as full:
                os.dup2(full.fileno(), metrics)

    if "limit_at" in case:
        checkpointer.publish = limited_publish
    return nano.train(rank, case, before_step=fill)


@pytest.fixture(scope="module")
def small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A small file system, or None where mounting is not permitted."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", DISK, "tmpfs", folder], capture_output=True).returncode == 0
    yield folder if mounted else None
    if mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory, small_disk: Path | None) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("full-disk")
    recipe = nano.write_recipe(folder, checkpoint={"interval": 2})
    cases = {
        "limit": nano.case(recipe, "limit", limit_at=4),
        "metrics": nano.case(recipe, "metrics", metrics_full_at=5),
        "metrics again": nano.case(recipe, "metrics", "training.stop_after=6"),
        "begun": nano.case(recipe, "damaged", "training.stop_after=6"),
    }
    if small_disk is not None:
        disk = f"run.directory={small_disk}"
        cases["full"] = nano.case(recipe, "full", disk)
        cases["no room"] = nano.case(recipe, "other", disk)
    outcomes = dict(zip(cases, run_forked("tests.training.test_full_disk:worker", list(cases.values())), strict=True))
    for step in (4, 6):
        _damage(folder / "runs" / "damaged" / "checkpoints" / f"step-{step}")
    cases = {
        "damaged": nano.case(recipe, "damaged"),
        "previous": nano.case(recipe, "damaged", "checkpoint.on_corrupt=previous", "training.stop_after=8"),
    }
    outcomes |= zip(cases, run_forked("tests.training.test_full_disk:worker", list(cases.values())), strict=True)
    nano.write_tokens(folder / "data" / "train", 20_000, seed=9)
    changed = run_forked("tests.training.test_full_disk:worker", [nano.case(recipe, "metrics")])
    return folder, outcomes | {"changed data": changed[0]}


def _damage(checkpoint: Path) -> None:
    """One bit of one file, in the middle."""
    path = max(checkpoint.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _error(outcome: list[Outcome], *statuses: int) -> str:
    """The one line with which the ranks ended."""
    nano.check(outcome, *(statuses or (2, 2)))
    lines = [line for line in outcome[0].log.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in outcome[0].log, outcome[0].log
    return lines[0]


def test_a_rank_that_cannot_save_stops_all_and_the_checkpoint_before_stays(jobs: Any) -> None:
    folder, outcomes = jobs
    error = _error(outcomes["limit"])
    assert "saving failed on rank 1: File too large" in error and "bytes are needed" in error
    checkpoints = folder / "runs" / "limit" / "checkpoints"
    assert {path.name for path in checkpoints.iterdir()} == {"step-2", "latest", ".lock"}


def test_metrics_that_cannot_be_written_end_the_run_with_a_checkpoint(jobs: Any) -> None:
    folder, outcomes = jobs
    error = _error(outcomes["metrics"], 2, 0)
    assert "cannot write metrics: No space left on device" in error
    assert "stopped after step 6 by a failure to write metrics" in outcomes["metrics"][0].log
    nano.check(outcomes["metrics again"])
    assert "at step 6" in outcomes["metrics again"][0].log


def test_a_full_disk_stops_all_ranks_with_the_numbers(jobs: Any, small_disk: Path | None) -> None:
    if small_disk is None:
        pytest.skip("mounting a small file system is not permitted here")
    _, outcomes = jobs
    error = _error(outcomes["full"])
    assert "saving failed" in error and "bytes are needed" in error and str(small_disk / "full") in error
    steps = len(outcomes["full"][0].result["samples"])
    names = {path.name for path in (small_disk / "full" / "checkpoints").iterdir()}
    newest = max(int(name.removeprefix("step-")) for name in names if name.startswith("step-"))
    assert names == {".lock", "latest", *(f"step-{step}" for step in range(2, newest + 1, 2))}
    assert newest + 2 <= steps < nano.STEPS, "the failure of the next save, behind the training's back, is noticed"
    error = _error(outcomes["no room"])
    assert "a checkpoint needs" in error and "are free" in error
    assert not (small_disk / "other" / METRICS).exists(), "found before the first step"


def test_a_damaged_checkpoint_stops_the_run_or_is_passed_over_as_asked(jobs: Any) -> None:
    folder, outcomes = jobs
    checkpoints = folder / "runs" / "damaged" / "checkpoints"
    error = _error(outcomes["damaged"])
    assert "step-6" in error and "on_corrupt=previous" in error
    nano.check(outcomes["previous"])
    assert "at step 2" in outcomes["previous"][0].log
    assert [record[0] for record in nano.losses(folder / "runs" / "damaged")][:8] == list(range(1, 9))
    # what was damaged is kept for whoever wants to look, under a name that nothing loads
    kept = {path.name for path in checkpoints.iterdir()} - {".lock", "latest"}
    assert {"step-2", "step-4", "step-6", "step-8"} < kept and len(kept) == 6


def test_changed_data_is_refused_on_resume(jobs: Any) -> None:
    folder, outcomes = jobs
    error = _error(outcomes["changed data"])
    assert f"{folder / 'data' / 'train'}: the data changed since the checkpoint was saved" in error
