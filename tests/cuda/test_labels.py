"""A label outside the vocabulary: nothing on a GPU can be caught, so the process must end and say why."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.gpu_only
CODE = """
import torch
from minicpm_megatron import VocabParallelLinearCrossEntropy
hidden, weight = torch.ones(4, 8, device="cuda"), torch.ones(50, 8, device="cuda")
loss = VocabParallelLinearCrossEntropy(vocab_size=50)(hidden, weight, torch.tensor([1, 2, {label}, 3], device="cuda"))
torch.cuda.synchronize()
print("went on with", float(loss))
"""


@pytest.mark.parametrize(("label", "status"), [(49, 0), (50, 1), (-1, 1)])
def test_it_ends_the_process(label: int, status: int) -> None:
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", CODE.format(label=label)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert bool(done.returncode) == bool(status), done.stderr
    assert ("went on with" in done.stdout) == (status == 0)
    assert not status or "assert" in done.stderr.lower(), done.stderr
