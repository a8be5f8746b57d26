"""The plan against real training steps on two processes; `python -m benchmarks.plan_check` has many more layouts."""

from __future__ import annotations

import pytest

from benchmarks.plan_check import ROWS, UNEVEN
from tests.distributed.forked import Outcome, run_forked

CHOSEN = (
    "DP 2, ZeRO 1, bf16",
    "DP 2, ZeRO 2, bf16, short",
    "DP 2, ZeRO 3",
    "TP 2 SP",
    "CP 2 ring, ZeRO 1, bf16",
    "CP 2 Ulysses",
    "PP 2, ZeRO 1, full",
    "experts, EP 2, ZeRO 1",
    "Muon, DP 2, ZeRO 2, short",
    "Muon, TP 2 SP, ZeRO 1, bf16",
)


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[Outcome]]:
    return dict(zip(CHOSEN, run_forked("benchmarks.plan_check:measure", [ROWS[name] for name in CHOSEN]), strict=True))


@pytest.mark.parametrize("name", CHOSEN)
def test_memory_is_within_a_tenth(outcomes: dict[str, list[Outcome]], name: str) -> None:
    for rank in outcomes[name]:
        assert rank.result is not None, rank.log
        assert rank.result["predicted"] == pytest.approx(rank.result["peak"], rel=0.1)
        assert rank.result["resident"] > rank.result["peak"], "what the process holds contains the tensors"


@pytest.mark.parametrize("name", CHOSEN)
def test_every_byte_that_is_sent_is_planned(outcomes: dict[str, list[Outcome]], name: str) -> None:
    for rank in outcomes[name]:
        assert rank.result is not None, rank.log
        planned = {kind: sent for kind, sent in rank.result["predicted_sent"].items() if sent}
        sent = rank.result["sent"]
        if "expert" in planned:
            assert sent.pop("expert") == pytest.approx(planned.pop("expert"), rel=UNEVEN)
        assert sent == pytest.approx(planned, rel=1e-3), "ZeRO pads what does not divide"
