"""Random state: Megatron-Core's CUDA generators are saved and restored beside torch's.

Stand-ins for CUDA's generators, which a CPU does not have; the tracker is Megatron-Core's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel import random as megatron_random

from minicpm_megatron.parallel import device


def state(value: int) -> torch.Tensor:
    return torch.full((16,), value, dtype=torch.uint8)


class Cuda:
    """One CUDA generator and Megatron-Core's tracker with two more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, default: int, tracked: dict[str, int]) -> None:
        self.default = state(default)
        self.tracker = megatron_random.CudaRNGStatesTracker()
        self.tracker.set_states({name: state(value) for name, value in tracked.items()})
        monkeypatch.setattr(device, "on_cpu", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_rng_state", lambda: self.default)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self._set)
        monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER", self.tracker)
        monkeypatch.setattr(megatron_random, "_CUDA_RNG_STATE_TRACKER_INITIALIZED", True)

    def _set(self, new: torch.Tensor) -> None:
        self.default = new

    def values(self) -> dict[str, Any]:
        """First byte of every generator's state."""
        return {name: int(found[0]) for name, found in self.tracker.get_states().items()} | {
            "default": int(self.default[0])
        }


@pytest.fixture(autouse=True)
def torchs_own_state_stays() -> Iterator[None]:
    before = torch.get_rng_state()
    yield
    torch.set_rng_state(before)


def test_every_generator_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    Cuda(monkeypatch, 1, {"model-parallel-rng": 2, "expert-parallel-rng": 3})
    torch.manual_seed(5)
    saved = device.rng_state()
    drawn = torch.rand(3)
    assert all(each.dtype == torch.uint8 and each.device.type == "cpu" for each in saved.values())
    other = Cuda(monkeypatch, 9, {"model-parallel-rng": 9, "expert-parallel-rng": 9})
    device.set_rng_state(saved)
    assert other.values() == {"model-parallel-rng": 2, "expert-parallel-rng": 3, "default": 1}
    assert torch.equal(torch.rand(3), drawn)


def test_generators_that_were_not_saved_keep_their_state(monkeypatch: pytest.MonkeyPatch) -> None:
    saved = device.rng_state()  # on a CPU: torch's alone
    assert list(saved) == ["torch"]
    cuda = Cuda(monkeypatch, 7, {"model-parallel-rng": 8})
    device.set_rng_state(saved)
    assert cuda.values() == {"model-parallel-rng": 8, "default": 7}


def test_a_cpu_takes_torchs_generator_of_a_cuda_checkpoint() -> None:
    torch.manual_seed(5)
    saved = {"torch": torch.get_rng_state(), "cuda": state(1), "megatron.model-parallel-rng": state(2)}
    drawn = torch.rand(3)
    torch.manual_seed(6)
    device.set_rng_state(saved)
    assert torch.equal(torch.rand(3), drawn)
