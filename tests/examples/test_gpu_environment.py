"""The settings for GPUs: what a user set stays, and every launch example has the same ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import yaml

EXAMPLES = Path(__file__).parents[2] / "examples"
SETTINGS = {
    "CUDA_DEVICE_MAX_CONNECTIONS": "1",
    "PYTORCH_ALLOC_CONF": "expandable_segments:True",
    "NCCL_DEBUG": "WARN",
    "OMP_NUM_THREADS": "8",
}


def sourced(**environment: str) -> dict[str, str]:
    done = subprocess.run(
        ["bash", "-euc", "source gpu_environment.sh && env"],
        cwd=EXAMPLES,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return {name: found[name] for name in SETTINGS}


def test_what_is_set_stays() -> None:
    assert sourced() == SETTINGS
    theirs = {"CUDA_DEVICE_MAX_CONNECTIONS": "8", "NCCL_DEBUG": "INFO"}
    assert sourced(**theirs) == SETTINGS | theirs


def test_launch_examples_have_the_same_settings() -> None:
    for script in (EXAMPLES / "slurm" / "train.sbatch", EXAMPLES / "megatron_lm" / "pretrain_minicpm.sh"):
        assert "source examples/gpu_environment.sh" in script.read_text()
    documents = yaml.safe_load_all((EXAMPLES / "kubernetes" / "train.yaml").read_text())
    job = next(each for each in documents if each["kind"] == "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert {each["name"]: each["value"] for each in container["env"]} == SETTINGS
