"""A dead worker ends the job with a line, a dead parent ends its workers."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.data.worker_pool import run_tasks
from minicpm_megatron.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[2]


def make_worker(setup: str) -> Callable[[int, Callable[[int], None]], tuple[str, int]]:
    """Squares numbers; some numbers are special."""

    def work(task: int, report: Callable[[int], None]) -> tuple[str, int]:
        if task == -1:
            os.kill(os.getpid(), signal.SIGKILL)
        if task == -2:
            raise UserError("this number is refused", where="task")
        if task == -3:
            Path(setup, f"{os.getpid()}.pid").touch()
            while True:
                report(1)
                time.sleep(0.01)
        report(task)
        return setup, task * task

    return work


TARGET = f"{__name__}:make_worker"


@pytest.mark.parametrize("workers", [1, 3])
def test_every_task_is_done_once(workers: int) -> None:
    progress: list[int] = []
    found = sorted(run_tasks(TARGET, "s", list(range(10)), workers, progress.append))
    assert found == [(n, ("s", n * n)) for n in range(10)]
    assert sum(progress) == 45


def test_no_tasks() -> None:
    assert list(run_tasks(TARGET, "s", [], 2, lambda _: None)) == []


def test_killed_worker_is_told() -> None:
    with pytest.raises(UserError, match=r"a worker died \(SIGKILL\)"):
        list(run_tasks(TARGET, "s", [1, -1, 2, 3], 2, lambda _: None))


def test_refusal_comes_through() -> None:
    with pytest.raises(UserError, match="task: this number is refused"):
        list(run_tasks(TARGET, "s", [1, -2, 3], 2, lambda _: None))


def test_workers_do_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    program = (
        "from minicpm_megatron.data.worker_pool import run_tasks\n"
        "if __name__ == '__main__':\n"
        f"    list(run_tasks({TARGET!r}, {str(tmp_path)!r}, [-3, -3], 2, lambda _: None))\n"
    )
    (tmp_path / "parent.py").write_text(program)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], env=environment)
    deadline = time.monotonic() + 60
    while len(pids := [int(path.stem) for path in tmp_path.glob("*.pid")]) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert len(pids) == 2
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
