"""Whole engines under DeepSpeed on pretended CUDA devices: two steps, and what the second costs."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.fake_cuda import launch, records
from tests.fake_cuda.cases import ENGINES

pytestmark = [
    pytest.mark.skipif(launch.missing() is not None, reason=str(launch.missing())),
    pytest.mark.timeout(900),  # a process runs many cases
]


@functools.cache
def ran(world_size: int) -> dict[str, dict[str, Any]]:
    """Findings of `run_engines` in each case of so many ranks; in two processes, neither of which runs for minutes."""
    return launch.run("run_engines", *(name for name, case in ENGINES.items() if case.world_size == world_size))


@pytest.mark.parametrize("case", ENGINES)
def test_steps_are_made_on_the_device(case: str) -> None:
    found = ran(ENGINES[case].world_size)[case]
    assert "error" not in found, found["error"]
    assert found["wrong"] == []


@pytest.mark.parametrize("case", ENGINES)
def test_operations_bytes_and_host_waits_are_as_recorded(case: str) -> None:
    found = ran(ENGINES[case].world_size)[case]
    assert records.differences(case, records.read(records.COUNTS)[case], found.get("counts", {})) == []
