"""The benchmark of ZeRO 1 runs and prints its table; what it measures is not asserted."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = "--preset minicpm-nano --vocab-size 64 --sequence-length 8 --micro-batch 1 --ranks 1 --steps 1 --rounds 2"
ROW = r" *\| [\d.]+ \([\d.]+ to [\d.]+\) *\| [\d.]+ \([\d.]+ to [\d.]+\)$"


def test_every_candidate_and_ratio_has_its_row() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/zero1_step.py", *SMALL.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for name in ("zero1", "ddp", "llama", "zero1 / ddp", "zero1 / llama"):
        assert re.search(f"^{name}{ROW}", done.stdout, re.MULTILINE), done.stdout
