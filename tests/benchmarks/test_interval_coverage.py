"""The benchmark of intervals runs and prints its table; what it measures is not asserted."""

from __future__ import annotations

import sys

import pytest

from benchmarks import interval_coverage


@pytest.mark.parametrize("method", ["curve_fit", "huber"])
def test_every_level_has_its_row(
    method: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = f"--method {method} --draws 2 --resamples 100 --level 0.8 0.95"
    monkeypatch.setattr(sys, "argv", ["interval_coverage.py", *options.split()])
    interval_coverage.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows] == ["level", "80%", "95%"]
    assert all(len(row) == 10 and 0 <= float(cell) <= 100 for row in rows[1:] for cell in row[1:])
