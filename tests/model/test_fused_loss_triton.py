"""Triton's kernels against torch's: with `--device cuda`, or on CPU with Triton installed and TRITON_INTERPRET=1."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import pytest
import torch

from minicpm_megatron import VocabParallelLinearCrossEntropy
from minicpm_megatron.errors import UserError
from tests.device import on_cuda, put

INSTALLED = importlib.util.find_spec("triton") is not None
RUNS = INSTALLED and (on_cuda() or os.environ.get("TRITON_INTERPRET") == "1")
TOKENS, HIDDEN, ROWS = 37, 24, 5003  # more columns than a program holds at once


@pytest.mark.skipif(not RUNS, reason="needs Triton and CUDA, or TRITON_INTERPRET=1")
@pytest.mark.parametrize("settings", [{}, {"z_loss": 0.01, "logit_scale": 0.5}, {"gradient_in": "backward"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_kernels_give_the_same(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    hidden = put(torch.randn(TOKENS, HIDDEN).to(dtype)).requires_grad_()
    weight = put(torch.randn(ROWS, HIDDEN).to(dtype)).requires_grad_()
    labels = put(torch.randint(4990, (TOKENS,)))
    labels[3] = -100
    found = []
    for kernels in ("torch", "triton"):
        fused = VocabParallelLinearCrossEntropy(
            reduction="none", vocab_size=4990, kernels=kernels, chunk_bytes=11 * ROWS * dtype.itemsize, **settings
        )
        losses = fused(hidden, weight, labels)
        found.append((losses.detach(), *torch.autograd.grad(0.37 * losses.sum(), (hidden, weight))))
    # the interpreter cuts bf16 where a GPU rounds; measured 6e-3 there
    most = 1e-2 if dtype == torch.bfloat16 else 1e-5
    for ours, reference in zip(found[1], found[0], strict=True):
        assert float((ours.double() - reference.double()).norm() / reference.double().norm()) < most


@pytest.mark.skipif(INSTALLED, reason="says what happens without Triton")
def test_without_triton_it_is_asked_for() -> None:
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    with pytest.raises(UserError, match="Triton is not installed"):
        VocabParallelLinearCrossEntropy(kernels="triton")(hidden, weight, torch.tensor([0, 1, 2]))


@pytest.mark.skipif(not INSTALLED, reason="needs Triton")
def test_fp64_keeps_its_digits() -> None:
    """The kernels compute in fp32: asked for they are refused, and "auto" is torch's."""
    hidden, weight = (put(torch.randn(rows, HIDDEN, dtype=torch.float64)) for rows in (TOKENS, 50))
    labels = put(torch.arange(TOKENS))
    with pytest.raises(UserError, match="compute in fp32, and the inputs are torch.float64"):
        VocabParallelLinearCrossEntropy(kernels="triton")(hidden, weight, labels)
    auto, own = (
        VocabParallelLinearCrossEntropy(kernels=kernels)(hidden, weight, labels) for kernels in ("auto", "torch")
    )
    assert torch.equal(auto, own)
