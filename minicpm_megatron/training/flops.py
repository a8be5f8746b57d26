"""Model FLOP/s and utilisation: what the model needs, over what the machine can do."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from minicpm_megatron.parallel import device
from minicpm_megatron.recipe.flops import flops_per_token
from minicpm_megatron.recipe.gpu_peaks import PEAK_FLOPS

__all__ = ["Peak", "device_peak", "flops_per_token"]


@dataclass(frozen=True)
class Peak:
    """The most that one rank's device can do.

    Attributes:
        flops: FLOP/s.
        measured: of which device and precision it was measured, for want of a stated figure; None: it is stated.
    """

    flops: float
    measured: str | None = None

    def describe(self) -> str:
        """One line for the console."""
        if self.measured is None:
            return f"utilisation is of the {self.flops:.4g} FLOP/s that the GPU's maker states"
        return (
            f"no stated peak is known of {self.measured}: utilisation is of {self.flops:.3g} FLOP/s a rank, measured"
            " with a square matrix product"
        )


def device_peak(precision: str) -> Peak:
    """The peak of this rank's device: from the table, else the rate of a square matrix product.

    On CPU every rank measures at the same time, on its share of the cores, as it will train.
    """
    name = "this CPU" if device.on_cpu() else torch.cuda.get_device_name()
    if precision == "bf16" and name in PEAK_FLOPS:
        return Peak(PEAK_FLOPS[name])
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    size = 768 if device.on_cpu() else 8192
    # a generator of its own: measuring must not move the random state of the run
    generator = torch.Generator(device.device()).manual_seed(0)
    matrix = torch.randn(size, size, dtype=dtype, device=device.device(), generator=generator)
    best = 0.0
    torch.matmul(matrix, matrix)
    for _ in range(5):
        device.synchronize()
        start = time.perf_counter()
        torch.matmul(matrix, matrix)
        device.synchronize()
        best = max(best, 2.0 * size**3 / (time.perf_counter() - start))
    return Peak(best, measured=f"{name} in {precision}")
