"""The example of docs/own_script.md runs as printed."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from minicpm_megatron.methods.mup import width_multiplier
from minicpm_megatron.recipe import get_preset
from tests.processes.client import run_script

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.cpu_only("one process of a page for readers")
def test_the_page_runs_and_its_rates_are_those_of_the_table(tmp_path: Path) -> None:
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "own_script.md").read_text(), re.S)
    (tmp_path / "script.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    # what torchrun sets for the only process of a job
    environment |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = run_script("script.py", environment=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    last = done.stdout.strip().splitlines()[-1]
    rates = [float(each) for each in re.findall(r"[\d.e-]+", last)[:3]]
    # embedding, hidden and head, after five half-lives
    end, m = 0.01 / 32, width_multiplier(get_preset("minicpm-nano"))
    assert rates == pytest.approx([end, end / m, end], abs=1e-6)
