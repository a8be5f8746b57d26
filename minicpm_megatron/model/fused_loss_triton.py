"""Triton's kernels for `fused_loss_chunks`: one program a token goes through its logits once for each function.

Imported only where they are used. `ChunkedHead` without them is the reference; TRITON_INTERPRET=1 runs them on CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096  # logits that a program holds at once


@triton.jit
def _with_block(largest, total, values):  # type: ignore[no-untyped-def]
    higher = tl.maximum(largest, tl.max(values, 0))
    return higher, total * tl.exp(largest - higher) + tl.sum(tl.exp(values - higher), 0)


@triton.jit
def _statistics(logits, labels, found, columns, stride, tokens, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    largest = tl.full((), -float("inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    # without a mask Triton loads 16 bytes at once, where the stride is a multiple of 16
    whole = columns - columns % BLOCK
    for start in range(0, whole, BLOCK):
        values = tl.load(row + start + tl.arange(0, BLOCK)).to(tl.float32)
        largest, total = _with_block(largest, total, values)
    places = whole + tl.arange(0, BLOCK)
    values = tl.load(row + places, mask=places < columns, other=-float("inf")).to(tl.float32)
    largest, total = _with_block(largest, total, values)
    label = tl.load(labels + token)
    target = tl.load(row + label, mask=label >= 0, other=0.0).to(tl.float32)
    tl.store(found + token, largest + tl.log(total))
    tl.store(found + tokens + token, target)


@triton.jit
def _gradient(values, places, label, log_sum, softmax_factor, factor):  # type: ignore[no-untyped-def]
    return tl.exp(values.to(tl.float32) - log_sum) * softmax_factor - tl.where(places == label, factor, 0.0)


@triton.jit
def _differentiate(  # type: ignore[no-untyped-def]
    logits, labels, log_sums, softmax_factors, factors, columns, stride, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    row = logits + token * stride
    log_sum, label = tl.load(log_sums + token), tl.load(labels + token)
    softmax_factor, factor = tl.load(softmax_factors + token), tl.load(factors + token)
    whole = columns - columns % BLOCK
    for start in range(0, whole, BLOCK):
        places = start + tl.arange(0, BLOCK)
        values = tl.load(row + places)
        tl.store(row + places, _gradient(values, places, label, log_sum, softmax_factor, factor))
    places = whole + tl.arange(0, BLOCK)
    inside = places < columns
    values = tl.load(row + places, mask=inside, other=-float("inf"))
    tl.store(row + places, _gradient(values, places, label, log_sum, softmax_factor, factor), mask=inside)


def statistics(logits: Tensor, labels: Tensor, found: Tensor) -> Tensor:
    """As `ChunkedHead.statistics`: logits [n, V], labels int64 [n], -1 where another rank has it; fp32 [2, n]."""
    _statistics[(labels.size(0),)](
        logits, labels, found, logits.size(1), logits.stride(0), labels.size(0), BLOCK=BLOCK, num_warps=8
    )
    return found


def differentiate_(logits: Tensor, labels: Tensor, log_sum: Tensor, softmax_factor: Tensor, factor: Tensor) -> Tensor:
    """As `ChunkedHead.differentiate_`; all but logits and labels fp32 [n]."""
    _differentiate[(labels.size(0),)](
        logits,
        labels,
        log_sum.contiguous(),
        softmax_factor.contiguous(),
        factor.contiguous(),
        logits.size(1),
        logits.stride(0),
        BLOCK=BLOCK,
        num_warps=8,
    )
    return logits
