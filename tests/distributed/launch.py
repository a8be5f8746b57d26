"""Run a function of the tests on N real processes over gloo, with a timeout and no orphans.

With `pytest --device cuda` one process uses the GPU, and a test that wants more is skipped.

    results = run_on_ranks("tests.distributed.test_x:worker", world_size=2, step=3)

Each process calls `worker(**kwargs)` with RANK, WORLD_SIZE and a rendezvous set up and returns something that
JSON can hold; `results` is the list of those values by rank. A worker that raises fails the test with its
traceback; one that hangs is killed with its whole process group.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.device import ON_CPU, need
from tests.processes.client import importing, with_nothing_imported


class WorkerFailed(AssertionError):
    """A rank exited with an error or the job ran past its timeout."""


def run_on_ranks(
    target: str,
    world_size: int,
    *,
    timeout: float = 180.0,
    env: dict[str, str] | None = None,
    expect_death: bool = False,
    new_imports: bool = False,
    **kwargs: Any,
) -> list[Any]:
    """Call `module:function(**kwargs)` on `world_size` processes and return their results by rank.

    Args:
        target: importable "package.module:function".
        timeout: seconds after which every process group is killed and the call fails.
        env: added to the environment; `tests.device.ON_CPU` computes a reference on the CPU.
        expect_death: when True, a rank that leaves no result yields its (negative) return code instead of failing.
        new_imports: import everything in processes that start with `env`, for libraries that read it then.
    """
    if env is not ON_CPU:
        need(world_size)
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if new_imports:
            server = stack.enter_context(with_nothing_imported({**os.environ, **(env or {})}))
        else:
            server = importing(target.partition(":")[0])
        processes = []
        for rank in range(world_size):
            environment = {
                **os.environ,
                **(env or {}),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MINICPM_TEST_STORE": str(folder / "store"),
                "OMP_NUM_THREADS": "1",
            }
            given = {"target": target, "folder": str(folder), "given": kwargs}
            with open(folder / f"log-{rank}", "wb") as log:
                processes.append(
                    server.start("tests.distributed.launch:rank", given, environment=environment, stdout=log)
                )
        deadline = time.monotonic() + timeout
        try:
            while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
                failed = [p for p in processes if p.poll() not in (None, 0)]
                if failed and not expect_death:
                    time.sleep(2.0)  # let the other ranks report what they saw
                    break
                time.sleep(0.01)
            late = time.monotonic() >= deadline
        finally:
            for process in processes:
                process.kill()
                process.wait()
        results = []
        for rank, process in enumerate(processes):
            path = folder / f"result-{rank}.json"
            if path.exists():
                results.append(json.loads(path.read_text()))
            elif expect_death and not late:
                results.append(process.returncode)
            else:
                logs = "\n".join(
                    f"--- rank {r}\n" + (folder / f"log-{r}").read_text(errors="replace")[-4000:]
                    for r in range(world_size)
                )
                reason = f"ran past {timeout} s" if late else f"exited with {process.returncode}"
                raise WorkerFailed(f"{target}: rank {rank} {reason}\n{logs}")
        return results


def init_gloo(timeout_seconds: float = 60.0) -> None:
    """Join the job's process group; for workers that do not go through the package's own start-up."""
    import datetime

    import torch.distributed as dist

    dist.init_process_group(
        "gloo",
        init_method=f"file://{os.environ['MINICPM_TEST_STORE']}",
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )


def rank(target: str, folder: str, given: dict[str, Any]) -> None:
    """What a rank does: call the worker, and leave what it returned."""
    module, _, function = target.partition(":")
    result = getattr(importlib.import_module(module), function)(**given)
    partial = Path(folder, f"result-{os.environ['RANK']}.json.tmp")
    partial.write_text(json.dumps(result))
    partial.rename(partial.with_suffix(""))
