"""What every registered attention kernel keeps, ours and other packages': the reference's results and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from minicpm_megatron.model.attention_kernels.reference import reference
from minicpm_megatron.registry import ATTENTION_KERNELS
from tests.device import put

BATCH, LENGTH, CHANNELS, SCALE = 2, 37, 16, 0.3
HEADS = [(4, 4), (6, 2), (4, 1)]  # (heads, groups)
# of the largest element of the reference in fp64. fp32: sums of 37 products in another order; measured 9e-7 at most.
# bf16 rounds scores or probabilities, products and results, 2^-9 each; measured 1.1e-2 at most
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-2}


def starts() -> Tensor:
    """Three documents in the first row, of which one is a single token, and one in the second: int [b, s]."""
    found = torch.zeros(BATCH, LENGTH, dtype=torch.int64)
    found[0, 11:], found[0, 12:] = 11, 12
    return put(found)


def whole_mask() -> Tensor:
    """A mask of Megatron-LM's data loader: causal, and token 5 hidden from all that follow; bool [b, 1, s, s]."""
    hidden = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    hidden[6:, 5] = True
    return put(hidden.expand(BATCH, 1, LENGTH, LENGTH).clone())


def ways() -> dict[str, dict[str, Any]]:
    """The ways to say which keys a query sees."""
    return {"causal": {"causal": True}, "documents": {"starts": starts()}, "mask": {"mask": whole_mask()}, "all": {}}


def tensors(heads: int, groups: int, dtype: torch.dtype, queries: int = LENGTH) -> list[Tensor]:
    """Query, key, value and the gradient of the result, [s, b, ., d], rounded to `dtype`."""
    random = torch.Generator().manual_seed(heads * groups)
    shapes = ((queries, heads), (LENGTH, groups), (LENGTH, groups), (queries, heads))
    return [put(torch.randn(s, BATCH, n, CHANNELS, generator=random).to(dtype)) for s, n in shapes]


def with_gradients(kernel: Any, given: list[Tensor], **seen: Any) -> list[Tensor]:
    """The result and the gradients of query, key and value."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in given[:3]]
    out = kernel(*leaves, scale=SCALE, **seen)
    assert (out.shape, out.dtype) == (leaves[0].shape, leaves[0].dtype)
    return [out.detach(), *torch.autograd.grad(out, leaves, given[3])]


def check_attention_kernel(name: str) -> dict[torch.dtype, float]:
    """Compare a kernel with the reference in fp64, forward and backward.

    Returns:
        Largest difference relative to the largest element, by dtype.
    """
    kernel, worst = ATTENTION_KERNELS.get(name), dict.fromkeys(TOLERANCES, 0.0)
    for dtype, tolerance in TOLERANCES.items():
        for heads, groups in HEADS:
            cases = [(tensors(heads, groups, dtype), seen) for seen in ways().values()]
            cases.append((tensors(heads, groups, dtype, queries=1), {}))  # one new token and a cache
            for given, seen in cases:
                found = with_gradients(kernel, given, **seen)
                expected = with_gradients(reference, [tensor.double() for tensor in given], **seen)
                for one, other in zip(found, expected, strict=True):
                    error = float((one.double() - other).abs().max() / other.abs().max())
                    assert error < tolerance, (name, dtype, heads, groups, list(seen), error)
                    worst[dtype] = max(worst[dtype], error)
    return worst
