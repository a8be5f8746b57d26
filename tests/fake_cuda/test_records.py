"""Comparison of recorded counts."""

from __future__ import annotations

from tests.fake_cuda import records
from tests.fake_cuda.cases import ENGINES, MODELS


def test_equal_counts_have_no_difference() -> None:
    assert records.differences("case", {"bytes": 3}, {"bytes": 3}) == []


def test_a_rise_a_fall_and_what_is_new_are_a_line_each() -> None:
    was, now = {"bytes": 3, "flops": 5, "same": 1}, {"bytes": 4, "host waits: item a.py:f": 1, "same": 1}
    lines = records.differences("ZeRO 1", was, now)
    assert [line.split(";")[0] for line in lines] == [
        "ZeRO 1: bytes: was 3, is 4",
        "ZeRO 1: flops: was 5, is 0",
        "ZeRO 1: host waits: item a.py:f: was 0, is 1",
    ]
    assert ["a rise" in line for line in lines] == [True, False, True]
    assert all(records.COMMAND in line for line in lines)


def test_every_case_is_recorded() -> None:
    assert set(records.read(records.COUNTS)) == {*MODELS, *ENGINES}
