"""The device on which tests compute: the CPU, or with `pytest --device cuda` one GPU.

tests/conftest.py decides, and passes it to every process that the tests start, in `VARIABLE`. By default no process
sees a GPU, so that a test says the same on every machine. Tests make what they give to a model with `put`; references
may stay on the CPU, to which `.cpu()` brings what they are compared with.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import torch

VARIABLE = "MINICPM_TEST_DEVICE"
VISIBLE = "CUDA_VISIBLE_DEVICES"
ON_CPU = {VARIABLE: "cpu", VISIBLE: "", "DS_ACCELERATOR": "cpu"}
"""Environment of a process that computes a reference on the CPU beside tests that use the GPU."""


def on_cuda() -> bool:
    """Return whether tests use the GPU."""
    return os.environ.get(VARIABLE) == "cuda"


def device() -> torch.device:
    """The device of models and of what they are given."""
    import torch

    return torch.device("cuda", 0) if on_cuda() else torch.device("cpu")


def put[Value: torch.Tensor | torch.nn.Module](value: Value) -> Value:
    """A tensor or a module on `device`. Draw tensors on the CPU first, so that both devices see the same numbers."""
    return cast(Value, value.to(device()))


def ranks(on_cpu: int) -> int:
    """Processes of a job: as many as the test wants on the CPU, and one on a GPU, which NCCL does not share."""
    return 1 if on_cuda() else on_cpu


def need(count: int) -> None:
    """Skip a test whose job has more processes than there are GPUs for."""
    if on_cuda() and count > 1:
        import pytest  # workers and benchmarks, which import this module, need none

        pytest.skip(f"{count} ranks over gloo; NCCL wants a GPU for each of them, and there is one")


def deterministic() -> None:
    """Let this process's kernels on the GPU add in a fixed order, for a test that compares bits."""
    if on_cuda():
        from minicpm_megatron.parallel.determinism import make_deterministic

        make_deterministic()
