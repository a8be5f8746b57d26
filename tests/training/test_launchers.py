"""The same run under the `deepspeed` command and under torchrun, and how a mistake ends under each."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training import nano

pytestmark = pytest.mark.cpu_only("two ranks over gloo")

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN_FAILED = 1  # torchrun's own status for ranks that end with another than 0


def launch(launcher: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    start = {
        "deepspeed": ["deepspeed", "--num_accelerators", "2", "--master_port", port],
        "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port", port],
    }[launcher]
    return subprocess.run(
        [Path(sys.executable).with_name(start[0]), *start[1:], "examples/train.py", *arguments],
        cwd=ROOT,
        env={**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=200,
    )


def test_both_launchers_make_the_same_run(tmp_path: Path) -> None:
    recipe = nano.write_recipe(tmp_path)
    for launcher in ("deepspeed", "torchrun"):
        done = launch(launcher, "--recipe", str(recipe), f"name={launcher}", "training.stop_after=2")
        assert done.returncode == 0, done.stdout
        assert "step 2/2 |" in done.stdout
        assert "DEPRECATED" not in done.stdout and "No CUDA runtime" not in done.stdout
    first, second = (tmp_path / "runs" / launcher for launcher in ("deepspeed", "torchrun"))
    assert nano.losses(first) == nano.losses(second)
    assert [record[0] for record in nano.losses(first)] == [1, 2, 2]
    assert nano.tensors(first / "checkpoints" / "step-2") == nano.tensors(second / "checkpoints" / "step-2")


@pytest.mark.parametrize(("launcher", "status"), [("deepspeed", 2), ("torchrun", TORCHRUN_FAILED)])
def test_a_mistake_is_told_once(launcher: str, status: int, tmp_path: Path) -> None:
    recipe = nano.write_recipe(tmp_path)
    done = launch(launcher, "--recipe", str(recipe), "model.vocab_size=300")
    assert done.returncode == status, done.stdout
    errors = [line for line in done.stdout.splitlines() if "error: " in line]
    assert len(errors) == 1 and "made for a vocabulary of 512" in errors[0], done.stdout
    assert not list((tmp_path / "runs").rglob("step-*"))
