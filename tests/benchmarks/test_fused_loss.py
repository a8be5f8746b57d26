"""The benchmark of the loss still runs, and all that it compares find the same loss."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.fused_loss import CANDIDATES, Case, table

ROOT = Path(__file__).parents[2]
SMALL = ["--tokens", "64", "--hidden", "32", "--vocabulary", "500", "--rounds", "2", "--dtype", "fp32"]


@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (1, ["fused", "fused, mean outside", "fused, gradient in backward", "naive", "DeepSpeed TiledFusedLogitsLoss"]),
        (2, ["fused", "Megatron unfused"]),
    ],
)
def test_candidates_agree(ranks: int, names: list[str]) -> None:
    command = [sys.executable, "-m", "benchmarks.fused_loss", *SMALL, "--tensor-parallel", str(ranks)]
    done = subprocess.run([*command, "--candidates", *names], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(f"| {name} |" in done.stdout for name in names), done.stdout
    assert "losses differ" not in done.stdout, done.stdout


def test_losses_that_differ_are_told() -> None:
    case = Case(64, 32, 500, "fp32", "cpu", 1, 1, 1, tuple(CANDIDATES))
    found = {"one": [(1.0, 1.0, 10, 6.2)], "other": [(1.0, 1.0, 10, 6.3)]}
    assert "losses differ" in table(case, [found])[-1]
