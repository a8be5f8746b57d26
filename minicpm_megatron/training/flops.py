"""Model FLOP/s and utilisation: what the model needs, over what the machine can do."""

from __future__ import annotations

import time

import torch

from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import ModelRecipe, count_parameters

# dense bf16 peaks in FLOP/s from NVIDIA's data sheets; what is not listed is measured
PEAKS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "B200": 2250e12}


def flops_per_token(model: ModelRecipe, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token, in the convention of PaLM's appendix B.

    6 for every weight that multiplies the token (the LM head too, the embedding lookup not), plus 12 x layers x
    heads x d_head x sequence_length for attention, which is counted as if it were not causal. Recomputed activations
    do not count: they are not model FLOPs.
    """
    matrices = count_parameters(model).active_non_embedding + model.hidden_size * model.vocab_size
    attention = model.num_layers * model.num_attention_heads * model.kv_channels * sequence_length
    return 6.0 * matrices + 12.0 * attention


def peak_flops(precision: str) -> float:
    """What this rank's device can do in FLOP/s: from the table, else the rate of a square matrix product.

    On CPU every rank measures at the same time, on its share of the cores, as it will train.
    """
    if not device.on_cpu():
        name = torch.cuda.get_device_name()
        known = [peak for key, peak in PEAKS.items() if key in name]
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
