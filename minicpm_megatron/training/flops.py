"""Model FLOP/s and utilisation: what the model needs, over what the machine can do."""

from __future__ import annotations

import time

import torch

from minicpm_megatron.parallel import device
from minicpm_megatron.recipe.flops import PEAK_FLOPS, flops_per_token

__all__ = ["flops_per_token", "peak_flops"]


def peak_flops(precision: str) -> float:
    """What this rank's device can do in FLOP/s: from the table, else the rate of a square matrix product.

    On CPU every rank measures at the same time, on its share of the cores, as it will train.
    """
    if not device.on_cpu():
        name = torch.cuda.get_device_name()
        known = [peak for key, peak in PEAK_FLOPS.items() if key in name]
        if known and precision == "bf16":
            return known[0]
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
    return best
