"""Tensors that the fused loss holds at once, as the formula of its docstring has them."""

from __future__ import annotations

import pytest
import torch

from benchmarks.plan_check import Recorder
from minicpm_megatron import VocabParallelLinearCrossEntropy
from minicpm_megatron.recipe.loss_chunks import CPU_SCRATCH_BYTES, SUM_BYTES
from tests.device import device, on_cuda

HIDDEN, ROWS, CHUNK = 16, 40_000, 64
# whole rows; Triton's kernels, which CUDA has, need none
SOFTMAX = 0 if on_cuda() else min(CPU_SCRATCH_BYTES // (8 * ROWS), CHUNK) * 8 * ROWS


def peak(tokens: int, dtype: torch.dtype, gradient_in: str, *, train: bool = True) -> int:
    """Bytes beyond inputs, losses and both gradients."""
    with Recorder() as recorder:
        hidden = torch.randn(tokens, HIDDEN, dtype=dtype, device=device(), requires_grad=train)
        weight = torch.randn(ROWS, HIDDEN, dtype=dtype, device=device(), requires_grad=train)
        labels = torch.randint(ROWS, (tokens,), device=device())
        loss = VocabParallelLinearCrossEntropy(gradient_in=gradient_in, chunk_bytes=CHUNK * ROWS * dtype.itemsize)
        before = recorder.peak = recorder.level
        value = loss(hidden, weight, labels)
        if train:
            value.backward()
    return recorder.peak - before - train * (hidden.nbytes + weight.nbytes)


@pytest.mark.parametrize("gradient_in", ["forward", "backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("tokens", [CHUNK, 2 * CHUNK, 16 * CHUNK, 64 * CHUNK])
def test_nothing_grows_with_tokens_times_vocabulary(tokens: int, dtype: torch.dtype, gradient_in: str) -> None:
    expected = CHUNK * ROWS * dtype.itemsize + SOFTMAX
    if tokens > 4 * CHUNK and dtype == torch.bfloat16:
        expected += 2 * ROWS * HIDDEN + 6 * min(
            SUM_BYTES[device().type] // 4, ROWS * HIDDEN
        )  # a sum in fp32, and what is added
    found = peak(tokens, dtype, gradient_in)
    assert expected <= found <= expected + 60 * tokens + 0.03 * expected
    assert found < tokens * ROWS * dtype.itemsize or tokens <= 2 * CHUNK, "less than the logits"


def test_without_gradients_a_chunk_is_all() -> None:
    assert (
        peak(64 * CHUNK, torch.bfloat16, "forward", train=False)
        <= 1.03 * (CHUNK * ROWS * 2 + SOFTMAX) + 60 * 64 * CHUNK
    )
