"""A disk that is full, fails or cannot be written: every rank says the same, and nothing is lost."""

from __future__ import annotations

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sharded import Fragment, ShardSpec
from tests.checkpoint.test_kill import save
from tests.distributed.forked import run_forked

MIB = 1 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def worker(rank: int, case: dict[str, Any]) -> str:
    import torch.distributed as dist

    folder, limits = Path(case["folder"]), resource.getrlimit(resource.RLIMIT_FSIZE)

    def on_phase(phase: str) -> None:
        if phase == "write" and rank == 0 and case["fault"] == "fills up":
            # rank 1 may be writing already and take the last bytes: full is full
            with contextlib.suppress(OSError):
                (folder.parent / "other").write_bytes(b"x" * (shutil.disk_usage(folder).free - 20_000))
        if phase == "write" and rank == 1 and case["fault"] == "limit":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
        if phase == "manifest" and case["fault"] == "limit at the manifest":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))

    checkpointer = Checkpointer(folder, group=dist.group.WORLD, on_phase=on_phase)
    try:
        if case["fault"] == "preflight":
            checkpointer.preflight(case["bytes"])
            return "passed"
        if case["fault"] == "defect":
            strange = torch.ones(1, dtype=torch.complex64 if rank else torch.float32)
            checkpointer.save(
                2,
                [Fragment(ShardSpec("w", (1,)), "param", 0, strange)],
                rank_tensors={},
                state=RunState(step=2),
                facts={},
            )
        elif case["fault"] == "too large":
            large = Fragment(ShardSpec("w", (2 * MIB,)), "param", 0, torch.zeros(2 * MIB))
            checkpointer.save(2, [large], rank_tensors={}, state=RunState(step=2), facts={})
        elif case["fault"] == "fills up":
            size = MIB // 4
            half = Fragment(ShardSpec("w", (2 * size,), 0, ((rank * size, size),)), "param", 0, torch.zeros(size))
            checkpointer.save(2, [half], rank_tensors={}, state=RunState(step=2), facts={})
        else:
            save(checkpointer, 2, seed=2, rank=rank, ranks=2)
    except (UserError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    return "saved"


def _before(folder: Path) -> Path:
    save(Checkpointer(folder), 1, seed=1, rank=0, ranks=1)
    return folder


def _nothing_lost(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {"step-1", "latest"}
    assert Checkpointer(folder).find_latest() == folder / "step-1"


def test_every_rank_reports_a_disk_that_fails_one_of_them(tmp_path: Path, small_disk: Path) -> None:
    faults = ["limit", "limit at the manifest", "defect", "too large", "fills up"]
    folders = [_before(tmp_path / str(number) / "c") for number, _ in enumerate(faults[:3])]
    folders += [_before(small_disk / "c")] * 2
    cases = [{"fault": fault, "folder": str(folder)} for fault, folder in zip(faults, folders, strict=True)]
    outcomes = dict(zip(faults, run_forked("tests.checkpoint.test_disk:worker", cases), strict=True))
    for folder in folders:
        _nothing_lost(folder)
    for fault, outcome in outcomes.items():
        assert outcome[0].result == outcome[1].result, fault
    words = {fault: outcome[0].result for fault, outcome in outcomes.items()}
    for fault, folder in zip(faults, folders, strict=True):
        if fault != "defect":
            assert words[fault].startswith(f"UserError: {folder}: saving failed on rank") and "\n" not in words[fault]
            assert "bytes are needed" in words[fault] and "are free" in words[fault]
            assert "earlier checkpoints are intact" in words[fault]
    assert "rank 1: File too large" in words["limit"] and "rank 0: File too large" in words["limit at the manifest"]
    assert "the disk is too full" in words["too large"] and f"{2 * 2 * MIB * 4 + MIB:,} bytes" in words["too large"]
    assert "No space left on device" in words["fills up"]
    assert words["defect"].startswith("RuntimeError: saving failed on rank 1: KeyError")


def test_what_cannot_be_written_is_found_before_the_first_step(tmp_path: Path, small_disk: Path) -> None:
    a_file = tmp_path / "file"
    a_file.write_text("x")
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", read_only], check=True)
    try:
        places = [a_file, a_file / "below", read_only / "c", small_disk / "c", small_disk / "c"]
        needs = [1, 1, 1, 4 * MIB, MIB]
        cases = [
            {"fault": "preflight", "folder": str(place), "bytes": need}
            for place, need in zip(places, needs, strict=True)
        ]
        outcomes = run_forked("tests.checkpoint.test_disk:worker", cases)
    finally:
        subprocess.run(["umount", "-l", read_only], check=True)
    assert all(outcome[0].result == outcome[1].result for outcome in outcomes)
    words = [outcome[0].result for outcome in outcomes]
    for place, line in zip(places[:3], words[:3], strict=True):
        assert line.startswith(f"UserError: {place}: cannot write checkpoints") and "run.directory" in line
    assert "File exists" in words[0] and "Not a directory" in words[1] and "Read-only file system" in words[2]
    assert f"{5 * MIB:,} bytes and" in words[3] and words[4] == "passed"
    assert a_file.read_text() == "x"


def test_a_hint_that_cannot_be_written_does_not_fail_the_save(tmp_path: Path) -> None:
    (tmp_path / "latest").mkdir()
    save(Checkpointer(tmp_path), 1, seed=1, rank=0, ranks=1)
    assert Checkpointer(tmp_path).find_latest() == tmp_path / "step-1"
