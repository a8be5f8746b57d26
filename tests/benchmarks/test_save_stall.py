"""The benchmark of saves runs and prints its table; what it measures is not asserted."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = "--preset minicpm-nano --vocab-size 64 --sequence-length 8 --rounds 2"


def test_every_way_to_save_has_its_row(tmp_path: Path) -> None:
    done = subprocess.run(
        ["torchrun", "--standalone", "--nproc_per_node", "1", "benchmarks/save_stall.py", *SMALL.split()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    for way in ("ours, blocking", "ours, asynchronous", "torch, blocking", "torch, asynchronous"):
        assert re.search(rf"^\| {way} \| [\d.]+ \| [\d.]+ to [\d.]+ \| [\d.]+ \| [\d.]+ \|$", done.stdout, re.MULTILINE)
    assert not list(tmp_path.glob("*/ours")), "what it wrote is removed"
