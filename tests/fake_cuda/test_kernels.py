"""Triton's kernels of the fused loss compile for the GPUs they are for, on a machine without one."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_cuda import launch, records
from tests.fake_cuda.cases import AS_RUN, KERNELS

pytestmark = [
    pytest.mark.skipif(launch.missing_triton() is not None, reason=str(launch.missing_triton())),
    pytest.mark.timeout(900),  # one process runs every case of the file
]


@pytest.fixture(scope="module")
def compiled() -> dict[str, dict[str, Any]]:
    """Registers, spills and memory accesses of each case."""
    return launch.run("run_kernels", shim=False)


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_compiles_without_spills(compiled: dict[str, dict[str, Any]], case: str) -> None:
    assert compiled[case]["spilled bytes"] == 0
    assert not [name for name in compiled[case] if name.startswith(("LDL", "STL"))]  # local memory is the spills' place


@pytest.mark.parametrize("case", KERNELS)
def test_a_kernel_is_as_recorded(compiled: dict[str, dict[str, Any]], case: str) -> None:
    assert records.differences(case, records.read(records.KERNELS)[case], compiled[case]) == []


def test_all_that_is_recorded_is_compiled(compiled: dict[str, dict[str, Any]]) -> None:
    assert set(records.read(records.KERNELS)) == set(compiled) == set(KERNELS)


@pytest.mark.parametrize("case", [case for case in KERNELS if case.endswith(AS_RUN)])
def test_logits_are_read_and_written_by_sixteen_bytes(compiled: dict[str, dict[str, Any]], case: str) -> None:
    elements = 4096 // (32 * compiled[case]["warps"])  # of a block of columns, in a thread
    times = elements * (4 if "fp32" in case else 2) // 16
    assert compiled[case]["LDG.E.128 instructions"] == times
    assert compiled[case].get("STG.E.128 instructions", 0) == (times if "_differentiate" in case else 0)
