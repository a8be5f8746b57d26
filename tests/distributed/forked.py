"""Many short jobs of a few ranks that may be killed, for the price of one start.

    outcomes = run_forked("tests.checkpoint.test_x:worker", [{"phase": "write"}, ...])

One process imports the worker's module, with everything that is slow to import, and forks the ranks of one case after
the other, so that every case has processes of its own. `worker(rank, case)` runs in each over gloo.

With `pytest --device cuda` cases have one rank, over NCCL; a test with a case of more is skipped.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.device import need, on_cuda

REPOSITORY = Path(__file__).resolve().parents[2]
CASE_TIMEOUT = 180.0


@dataclass(frozen=True)
class Outcome:
    """How a rank ended.

    Attributes:
        result: what the worker returned (JSON), None where it did not.
        status: exit status, or the negative number of the signal that ended it.
        log: its standard output and error.
    """

    result: Any
    status: int
    log: str


def run_forked(target: str, cases: list[dict[str, Any]]) -> list[list[Outcome]]:
    """Outcomes of every case, each a list by rank; case["ranks"] is the number of ranks, 2 unless given."""
    need(max(case.get("ranks", 2) for case in cases))
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "cases.json").write_text(json.dumps(cases))
        with open(Path(scratch) / "log", "wb") as log:
            parent = subprocess.Popen(
                [sys.executable, "-m", "tests.distributed.forked", target, scratch],
                cwd=REPOSITORY,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            status = parent.wait(timeout=len(cases) * CASE_TIMEOUT)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(parent.pid, signal.SIGKILL)
        assert status == 0, (Path(scratch) / "log").read_text(errors="replace")[-4000:]
        outcomes = json.loads((Path(scratch) / "outcomes.json").read_text())
    return [[Outcome(**rank) for rank in ranks] for ranks in outcomes]


def _worker(target: str) -> Any:
    module, function = target.split(":")
    return getattr(importlib.import_module(module), function)


def _rank(target: str, rank: int, folder: Path, case: dict[str, Any]) -> None:
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    ranks = case.get("ranks", 2)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}.items():
        os.environ[name] = str(value)
    status = 1
    try:
        import torch.distributed as dist

        worker = _worker(target)
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if on_cuda() else "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=ranks,
            timeout=datetime.timedelta(seconds=60),
        )
        result = worker(rank, case)
        (folder / f"{rank}.json").write_text(json.dumps(result))
        status = 0
        if dist.is_initialized():
            dist.barrier()
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:  # whatever happens, a rank must not go on as a second parent
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(status)


def _run_case(target: str, folder: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    folder.mkdir()
    sys.stdout.flush()
    children = []
    for rank in range(case.get("ranks", 2)):
        child = os.fork()
        if child == 0:
            _rank(target, rank, folder, case)
        children.append(child)
    deadline, statuses = time.monotonic() + CASE_TIMEOUT, {}
    while len(statuses) < len(children):
        for rank, child in enumerate(children):
            if rank not in statuses:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return [
        {
            "result": json.loads(path.read_text()) if (path := folder / f"{rank}.json").exists() else None,
            "status": statuses[rank],
            "log": (folder / f"{rank}.log").read_text(errors="replace"),
        }
        for rank in range(len(children))
    ]


def _main(target: str, scratch: str) -> None:
    if not on_cuda():  # a child cannot use a GPU that importing DeepSpeed has used in its parent
        _worker(target)
    cases = json.loads((Path(scratch) / "cases.json").read_text())
    outcomes = [_run_case(target, Path(scratch) / str(number), case) for number, case in enumerate(cases)]
    (Path(scratch) / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    _main(*sys.argv[1:3])
