"""Many short jobs of two ranks that may be killed, for the price of one start.

    outcomes = run_forked("tests.checkpoint.test_x:worker", [{"phase": "write"}, ...])

One process imports what the worker needs and forks the ranks of one case after the other; `worker(rank, case)` runs
in each over gloo. An outcome is, by rank, what the worker returned (JSON) or the negative number of the signal that
ended it.
"""

from __future__ import annotations

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
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RANKS = 2
CASE_TIMEOUT = 60.0


def run_forked(target: str, cases: list[dict[str, Any]]) -> list[list[Any]]:
    """Outcomes of every case, each a list by rank."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "cases.json").write_text(json.dumps(cases))
        done = subprocess.run(
            [sys.executable, "-m", "tests.checkpoint.forked", target, scratch],
            cwd=REPOSITORY,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=len(cases) * CASE_TIMEOUT,
        )
        assert done.returncode == 0, done.stdout[-4000:]
        return json.loads((Path(scratch) / "outcomes.json").read_text())


def _rank(worker: Any, rank: int, folder: Path, case: dict[str, Any]) -> None:
    import torch.distributed as dist

    try:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder / 'store'}",
            rank=rank,
            world_size=RANKS,
            timeout=datetime.timedelta(seconds=20),
        )
        (folder / f"{rank}.json").write_text(json.dumps(worker(rank, case)))
        dist.barrier()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _run_case(worker: Any, folder: Path, case: dict[str, Any]) -> list[Any]:
    folder.mkdir()
    children = []
    for rank in range(RANKS):
        child = os.fork()
        if child == 0:
            _rank(worker, rank, folder, case)
        children.append(child)
    deadline, statuses = time.monotonic() + CASE_TIMEOUT, {}
    while len(statuses) < RANKS:
        for rank, child in enumerate(children):
            if rank not in statuses:
                if time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    statuses[rank] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    paths = [folder / f"{rank}.json" for rank in range(RANKS)]
    return [json.loads(path.read_text()) if path.exists() else statuses[rank] for rank, path in enumerate(paths)]


def _main(target: str, scratch: str) -> None:
    module, function = target.split(":")
    worker = getattr(importlib.import_module(module), function)
    cases = json.loads((Path(scratch) / "cases.json").read_text())
    outcomes = [_run_case(worker, Path(scratch) / str(number), case) for number, case in enumerate(cases)]
    (Path(scratch) / "outcomes.json").write_text(json.dumps(outcomes))


if __name__ == "__main__":
    _main(*sys.argv[1:3])
