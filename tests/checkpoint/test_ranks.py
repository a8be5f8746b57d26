"""Two real ranks: one killed at each phase of a save, one whose disk fails, and what both say about it."""

from __future__ import annotations

import datetime
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.checkpoint.publish import PHASES
from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage import manifest
from tests.checkpoint.synthetic import ROWS, content, names, save, world
from tests.distributed.launch import init_gloo, run_on_ranks
from tests.processes.client import run_call

PART = "part"  # the bytes of a rank are on the disk, under their temporary name
KILLS = [(0, phase) for phase in (*PHASES, PART)]
KILLS += [(1, phase) for phase in ("prepare", "write", PART, "written", "done")]
LARGE = 1 << 18  # rows of 32 bytes: 8 MiB a checkpoint


def kill_worker(folder: str) -> list[str]:
    """Every case in forks of this rank, so that torch is imported once; how each fork ended."""
    rank, ends = int(os.environ["RANK"]), []
    for number, (victim, phase) in enumerate(KILLS):
        child = os.fork()
        if not child:
            _save_and_die(Path(folder) / f"case-{number}", rank, phase if rank == victim else "")
        status = os.waitpid(child, 0)[1]
        ends.append("killed" if os.WIFSIGNALED(status) else f"exit {os.WEXITSTATUS(status)}")
    return ends


def _save_and_die(directory: Path, rank: int, phase: str) -> None:
    def on_phase(reached: str) -> None:
        if reached == phase:
            os.kill(os.getpid(), signal.SIGKILL)

    status = 3
    try:
        directory.mkdir(exist_ok=True)
        dist.init_process_group(
            "gloo",
            init_method=f"file://{directory}.store",
            rank=rank,
            world_size=2,
            timeout=datetime.timedelta(seconds=20),
        )
        save(world(directory), 1)
        if phase == PART:
            os.replace = lambda source, target: os.kill(os.getpid(), signal.SIGKILL)
        save(world(directory, on_phase=on_phase), 2)
        status = 0
    except RuntimeError:  # gloo: the peer is gone
        status = 1
    finally:
        sys.stdout.flush()
        os._exit(status)


def test_kill_each_rank_at_each_phase(tmp_path: Path) -> None:
    ends = run_on_ranks("tests.checkpoint.test_ranks:kill_worker", 2, folder=str(tmp_path), timeout=120)
    for number, (victim, phase) in enumerate(KILLS):
        case = f"rank {victim} at {phase}"
        assert ends[victim][number] == "killed", case
        # rank 1 has nothing to wait for once it is done; rank 0 at the latest notices when it exchanges again
        after_exchange = victim == 1 and phase in ("written", "done")
        if phase == "done":
            assert ends[1 - victim][number] == "exit 0", case
        elif not after_exchange:
            assert ends[1 - victim][number] == "exit 1", case
        directory = tmp_path / f"case-{number}"
        again = Checkpointer(directory, on_corrupt="stop")
        again.preflight(0)
        found = again.find_latest()
        assert found is not None, case
        step = content(found)
        assert found.name == f"step-{step}" and names(directory) == ["latest", "step-1", "step-2"][: step + 1], case
        # when rank 1 dies after rank 0 has its checksum, rank 0 may publish or may meet the death first
        expected = {1, 2} if after_exchange else {2} if phase in ("latest", "done") else {1}
        assert step in expected, case
        assert again.open(found).rank_tensors(1)["random"].tolist() == [1, 1, 1]


def _failure(directory: Path, action: str, rows: int = ROWS) -> str:
    try:
        if action == "preflight":
            world(directory).preflight(rows * 32)
        elif action == "find":
            world(directory).find_latest()
        else:
            save(world(directory), 2, rows=rows)
    except UserError as error:
        return str(error)
    return "no error"


def verify_worker(folder: str) -> dict[str, Any]:
    """What each rank reads to verify a checkpoint, and what all of them know of one that rank 1's disk cannot read."""
    init_gloo(30)
    rank, read, sound = dist.get_rank(), [], manifest.file_sha256
    checkpointer = world(Path(folder), on_corrupt="previous")
    save(checkpointer, 1)
    save(checkpointer, 2)

    def hashed(path: Path, on_block: Callable[[], None]) -> str:
        read.append(f"{path.parent.name}/{path.name}")
        if rank == 1 and path.parent.name == "step-2" and len(read) > 1:
            raise OSError(5, "Input/output error", str(path))
        return sound(path)

    manifest.file_sha256 = hashed
    found = [str(checkpointer.find_latest()) for _ in range(2)]
    return {"found": found, "read": read}


def test_ranks_share_the_reading_and_what_they_find(tmp_path: Path) -> None:
    one, two = run_on_ranks("tests.checkpoint.test_ranks:verify_worker", 2, folder=str(tmp_path))
    assert one["found"] == two["found"] == [str(tmp_path / "step-2"), str(tmp_path / "step-1")]
    for rank, said in enumerate((one, two)):
        assert said["read"] == [f"step-{step}/rank-{rank:05}.safetensors" for step in (2, 2, 1)]
    assert names(tmp_path) == ["latest", "step-1", "step-2"], "a disk that fails to read condemns nothing"


def slow_worker(folder: str) -> list[str]:
    """What each rank hears while rank 1 alone reads a file of 64 blocks."""
    init_gloo(30)
    rank, sound, heard = dist.get_rank(), manifest.file_sha256, []
    checkpointer = world(Path(folder), on_progress=lambda path: heard.append(path.name))
    save(checkpointer, 1)

    def hashed(path: Path, on_block: Callable[[], None]) -> str:
        for _ in range(64 if rank else 1):
            on_block()
        return sound(path)

    manifest.file_sha256 = hashed
    assert checkpointer.find_latest() == Path(folder) / "step-1"
    return heard


def test_a_rank_that_waits_for_another_one_to_read_is_not_silent(tmp_path: Path) -> None:
    one, two = run_on_ranks("tests.checkpoint.test_ranks:slow_worker", 2, folder=str(tmp_path))
    assert one == ["rank-00000.safetensors", *["step-1"] * 4]  # every 16 blocks of the other rank's file
    assert two == ["rank-00001.safetensors"] * 64


def fault_worker(folder: str, small: str | None, read_only: str | None) -> dict[str, Any]:
    """Everything that can go wrong with a disk, one after the other on the same two ranks."""
    init_gloo(30)
    root, rank, said = Path(folder), dist.get_rank(), {}
    for victim in (0, 1):
        save(world(root / f"limit-{victim}"), 1)
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == victim:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, unlimited[1]))
        said[f"limit-{victim}"] = _failure(root / f"limit-{victim}", "save", LARGE)
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    said["file"] = _failure(root / "file", "preflight")
    said["below file"] = _failure(root / "file" / "checkpoints", "preflight")
    said["file, at a save"] = _failure(root / "file", "save")
    if small is not None and read_only is not None:
        save(world(Path(small) / "checkpoints"), 1)
        said["small, before"] = _failure(Path(small) / "checkpoints", "preflight", LARGE)
        said["small, at a save"] = _failure(Path(small) / "checkpoints", "save", LARGE)
        said["read-only, before"] = _failure(Path(read_only) / "checkpoints", "preflight")
        said["read-only, at a save"] = _failure(Path(read_only) / "checkpoints", "save")
    save(world(root / "damaged"), 1)
    if rank == 0:
        (root / "damaged" / "step-1" / "rank-00001.safetensors").unlink()
    said["damaged"] = _failure(root / "damaged", "find")
    said["gathered"] = world(root).ranks.gather({"rank": rank, "text": "é" * rank * 1000, "none": None})
    try:
        world(root / "defect").save(
            1, [], rank_tensors={}, state=RunState(step=1), facts={"x": {1} if rank == 0 else 1}
        )
    except RuntimeError as error:
        said["defect"] = str(error)
    return said


@pytest.fixture
def mounts(tmp_path: Path) -> Iterator[tuple[str, str] | None]:
    """A file system of 4 MiB and a read-only one, where this process may mount any."""
    places = [tmp_path / "small", tmp_path / "read-only"]
    mounted = []
    for place, options in zip(places, ("size=4m", "size=4m,ro"), strict=True):
        place.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True).returncode == 0:
            mounted.append(place)
    yield (str(places[0]), str(places[1])) if mounted == places else None
    for place in mounted:
        subprocess.run(["umount", place], check=True)


def test_disk_faults(tmp_path: Path, mounts: tuple[str, str] | None) -> None:
    (tmp_path / "file").write_text("not a folder")
    small, read_only = mounts or (None, None)
    said = run_on_ranks(
        "tests.checkpoint.test_ranks:fault_worker", 2, folder=str(tmp_path), small=small, read_only=read_only
    )
    assert said[0] == said[1]
    one = said[0]
    needed = f"{LARGE * 32 + (1 << 20):,} bytes are needed"
    for victim in (0, 1):
        line = one[f"limit-{victim}"]
        assert f"rank {victim}: File too large" in line and needed in line and "are free" in line, line
        assert str(tmp_path / f"limit-{victim}") in line
        assert names(tmp_path / f"limit-{victim}") == ["latest", "step-1"]
        assert content(tmp_path / f"limit-{victim}" / "step-1") == 1
    for case in ("file", "below file", "file, at a save"):
        assert str(tmp_path / "file") in one[case] and one[case] != "no error"
    assert (tmp_path / "file").read_text() == "not a folder"
    assert "step-1/rank-00001.safetensors: missing" in one["damaged"]
    assert one["gathered"] == [{"rank": r, "text": "é" * r * 1000, "none": None} for r in (0, 1)]
    assert one["defect"].startswith("saving failed on rank 0: TypeError")
    assert names(tmp_path / "defect") == []
    if mounts is None:
        pytest.skip("the rest needs the right to mount a file system")
    assert "are free" in one["small, before"] and "bytes" in one["small, before"]
    assert needed in one["small, at a save"] and "the disk is too full" in one["small, at a save"]
    assert names(Path(mounts[0]) / "checkpoints") == ["latest", "step-1"]
    assert "Read-only file system" in one["read-only, before"]
    assert "Read-only file system" in one["read-only, at a save"]


def preflight(folder: str) -> None:
    """Another process that wants the folder."""
    Checkpointer(Path(folder)).preflight(0)


def test_a_second_preflight_does_not_let_go_of_the_folder(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path)
    checkpointer.preflight(0)
    checkpointer.preflight(0)
    other = run_call("tests.checkpoint.test_ranks:preflight", folder=str(tmp_path))
    assert other.returncode == 1 and f"in use by another process (pid {os.getpid()})" in other.stderr
