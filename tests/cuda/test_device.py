"""`parallel.device` on a machine with a GPU."""

from __future__ import annotations

import pytest
import torch

from minicpm_megatron.parallel import device

pytestmark = pytest.mark.gpu_only


def test_the_gpu_is_chosen() -> None:
    assert device.prepare() == torch.device("cuda", 0) == device.device()
    assert device.backend() == "nccl" and not device.on_cpu()


def test_random_state_goes_on_where_it_was_saved() -> None:
    saved = device.rng_state()
    assert {"torch", "cuda"} <= set(saved) and {state.device.type for state in saved.values()} == {"cpu"}

    def draw() -> list[float]:
        return [*torch.rand(3).tolist(), *torch.rand(3, device="cuda").tolist()]

    first = draw()
    assert draw() != first
    device.set_rng_state(saved)
    assert draw() == first


def test_peak_memory_is_the_allocators() -> None:
    torch.cuda.reset_peak_memory_stats()
    before = device.peak_memory_bytes()
    block = torch.empty(64 * 2**20, dtype=torch.uint8, device="cuda")
    assert device.peak_memory_bytes() - before >= block.nbytes
    del block
    assert device.peak_memory_bytes() - before >= 64 * 2**20, "the peak stays"
