"""`--device`: the whole suite on the CPU (default), or on a GPU those tests whose computation runs there.

By default CUDA devices are hidden from the tests and from all processes that they start. Otherwise models would be
built on a GPU while tests make their inputs on the CPU, and jobs of several ranks would choose NCCL with one GPU for
all of them.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.device import VARIABLE, VISIBLE

TESTS = Path(__file__).parent
# Folders and files in which something is computed on the device. Of the rest --device cuda runs nothing.
ON_THE_DEVICE = (
    "convert/test_generation.py",
    "cuda",
    "engine",
    "evaluation",
    "methods/test_decay_statistics.py",
    "methods/test_torch_schedulers.py",
    "model",
    "parallel/test_determinism.py",
    "training",
)
# Files that take longest, longest first. The processes of pytest-xdist take one file after the other: a long one at the
# end would leave the others without work.
LONG = (
    "training/test_signals.py",
    "distributed/test_parity.py",
    "distributed/test_experts.py",
    "distributed/test_coordinate_check.py",
    "benchmarks/test_gpu.py",
    "training/test_watchdog.py",
    "training/test_launchers.py",
    "training/test_start_up.py",
    "fake_cuda/test_engines.py",
    "convert/test_torch_dist.py",
    "training/test_resume.py",
    "windtunnel/test_search.py",
    "windtunnel/test_all.py",
    "windtunnel/test_command.py",
    "windtunnel/test_queue.py",
    "training/test_killed.py",
    "training/test_resume_experts.py",
    "training/test_upcycle.py",
    "training/test_faults.py",
    "megatron_lm/test_pretrain.py",
    "planning/test_measured.py",
    "training/test_full_disk.py",
    "training/test_stages.py",
    "data/test_preprocess.py",
)

# Before torch is imported, by whatever conftest or test comes next: CUDA reads it once.
_GIVEN = os.environ.get(VISIBLE)
os.environ[VISIBLE] = ""
# Megatron-Core wraps fused functions, which nothing here calls on the CPU, in torch.compile when it is imported; that
# imports Inductor: 1.3 of the 5.5 CPU-seconds that a rank takes to start.
_DYNAMO = "TORCHDYNAMO_DISABLE"
_GIVEN_DYNAMO = os.environ.get(_DYNAMO)
os.environ[_DYNAMO] = "1"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where tests compute (default: cpu)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cpu_only(reason): what the test is about exists on the CPU alone")
    config.addinivalue_line("markers", "gpu_only: only a GPU can decide it")
    # a shell that starts the tests in the background has them ignore SIGINT, and processes inherit that
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    chosen = os.environ[VARIABLE] = config.getoption("--device")
    if chosen == "cpu":
        return
    for name, given in ((VISIBLE, _GIVEN), (_DYNAMO, _GIVEN_DYNAMO)):
        if given is None:
            del os.environ[name]
        else:
            os.environ[name] = given
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_cpu = config.getoption("--device") == "cpu"
    if not on_cpu:
        elsewhere = [item for item in items if not _computes_on_the_device(item)]
        items[:] = [item for item in items if _computes_on_the_device(item)]
        config.hook.pytest_deselected(items=elsewhere)
    rank = {TESTS / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))
    for item in items:
        marker = item.get_closest_marker("gpu_only" if on_cpu else "cpu_only")
        if marker is not None:
            reason = "needs a GPU: pytest --device cuda" if on_cpu else f"CPU only: {marker.args[0]}"
            item.add_marker(pytest.mark.skip(reason=reason))


def _computes_on_the_device(item: pytest.Item) -> bool:
    place = item.path.relative_to(TESTS).as_posix()
    return any(place == chosen or place.startswith(f"{chosen}/") for chosen in ON_THE_DEVICE)
