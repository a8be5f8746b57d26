"""Many short jobs of a few ranks that may be killed, each rank a fork of a process that has imported everything.

    outcomes = run_forked("tests.checkpoint.test_x:worker", [{"phase": "write"}, ...])

Every case has processes of its own. `worker(rank, case)` runs in each over gloo.

With `pytest --device cuda` cases have one rank, over NCCL; a test with a case of more is skipped.
"""

from __future__ import annotations

import datetime
import importlib
import json
import os
import subprocess
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.device import need, on_cuda
from tests.processes.client import Server, importing

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
    server = importing(target.partition(":")[0])
    with tempfile.TemporaryDirectory() as scratch:
        return [_run_case(server, target, Path(scratch, str(number)), case) for number, case in enumerate(cases)]


def _run_case(server: Server, target: str, folder: Path, case: dict[str, Any]) -> list[Outcome]:
    folder.mkdir()
    ranks = case.get("ranks", 2)
    processes = []
    for rank in range(ranks):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **{name: str(value) for name, value in names.items()}}
        given = {"target": target, "rank": rank, "folder": str(folder), "case": case}
        with open(folder / f"{rank}.log", "wb") as log:
            processes.append(server.start("tests.distributed.forked:rank", given, environment=environment, stdout=log))
    end = time.monotonic() + CASE_TIMEOUT
    for process in processes:
        try:
            process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
    return [
        Outcome(
            json.loads(path.read_text()) if (path := folder / f"{rank}.json").exists() else None,
            process.wait(),
            (folder / f"{rank}.log").read_text(errors="replace"),
        )
        for rank, process in enumerate(processes)
    ]


def rank(target: str, rank: int, folder: str, case: dict[str, Any]) -> None:
    """What a rank does: join the others, call the worker, and leave what it returned."""
    import torch.distributed as dist

    module, _, function = target.partition(":")
    worker = getattr(importlib.import_module(module), function)
    ranks = int(os.environ["WORLD_SIZE"])
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if on_cuda() else "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=ranks,
        timeout=datetime.timedelta(seconds=60),
    )
    result = worker(rank, case)
    Path(folder, f"{rank}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        # that the others are gone is their own outcome
        try:
            dist.barrier()
        except BaseException:
            traceback.print_exc()
