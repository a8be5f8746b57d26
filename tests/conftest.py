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

# Before torch is imported, by whatever conftest or test comes next: CUDA reads it once.
_GIVEN = os.environ.get(VISIBLE)
os.environ[VISIBLE] = ""


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
    if _GIVEN is None:
        del os.environ[VISIBLE]
    else:
        os.environ[VISIBLE] = _GIVEN
    import torch

    if not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: torch sees no CUDA device here")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    on_cpu = config.getoption("--device") == "cpu"
    if not on_cpu:
        elsewhere = [item for item in items if not _computes_on_the_device(item)]
        items[:] = [item for item in items if _computes_on_the_device(item)]
        config.hook.pytest_deselected(items=elsewhere)
    for item in items:
        marker = item.get_closest_marker("gpu_only" if on_cpu else "cpu_only")
        if marker is not None:
            reason = "needs a GPU: pytest --device cuda" if on_cpu else f"CPU only: {marker.args[0]}"
            item.add_marker(pytest.mark.skip(reason=reason))


def _computes_on_the_device(item: pytest.Item) -> bool:
    place = item.path.relative_to(TESTS).as_posix()
    return any(place == chosen or place.startswith(f"{chosen}/") for chosen in ON_THE_DEVICE)
