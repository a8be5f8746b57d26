"""Models at MiniCPM-2.4B's widths on pretended CUDA devices: forward, backward, and what each layer costs."""

from __future__ import annotations

from typing import Any

import pytest

from tests.fake_cuda import launch, records
from tests.fake_cuda.cases import MODELS

pytestmark = [
    pytest.mark.skipif(launch.missing() is not None, reason=str(launch.missing())),
    pytest.mark.timeout(900),  # one process runs every case of the file
]


@pytest.fixture(scope="module")
def ran() -> dict[str, dict[str, Any]]:
    """Findings of `run_models` in each case."""
    return launch.run("run_models")


@pytest.mark.parametrize("case", MODELS)
def test_every_parameter_gets_a_gradient_on_the_device(ran: dict[str, dict[str, Any]], case: str) -> None:
    assert "error" not in ran[case], ran[case]["error"]
    assert ran[case]["wrong"] == []


@pytest.mark.parametrize("case", MODELS)
def test_operations_bytes_and_host_waits_are_as_recorded(ran: dict[str, dict[str, Any]], case: str) -> None:
    assert records.differences(case, records.read(records.COUNTS)[case], ran[case].get("counts", {})) == []
