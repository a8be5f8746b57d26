"""Attention that ends at the borders of documents packed into one sample.

Packed documents are told by `starts`: for every token the position in the sample at which its document begins. A token
attends to the tokens of its document up to itself. RoPE only sees differences of positions, so nothing else of a
document depends on where in a sample it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:
    flash_attn_varlen_func = None


def document_attention(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """Causal attention within documents.

    Args:
        query: [s, b, heads, d].
        key, value: [s, b, groups, d]; heads is a multiple of groups.
        starts: int [b, s]; starts[r, i] <= i is where the document of token i of row r begins.
        scale: factor on q k^T.

    Returns:
        [s, b, heads, d] in the dtype of query.
    """
    if flash_attn_varlen_func is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16):
        return _by_flash(query, key, value, starts, scale)
    return document_attention_by_sdpa(query, key, value, starts, scale)


def document_attention_by_sdpa(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    """`document_attention` by torch's scaled_dot_product_attention, one call a document."""
    rows = []
    for row, bounds in enumerate(_once(_bounds, starts)):
        parts = []
        for begin, end in zip(bounds, bounds[1:], strict=False):
            # [s, n, d] -> [1, n, s, d]
            q, k, v = (tensor[begin:end, row].transpose(0, 1)[None] for tensor in (query, key, value))
            part = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=scale, enable_gqa=q.size(1) != k.size(1)
            )
            parts.append(part[0].transpose(0, 1))
        rows.append(torch.cat(parts))
    return torch.stack(rows, 1)


_found: Any = WeakTensorKeyDictionary()  # starts -> (their version, what each function found in them)


def _once[T](find: Callable[[Tensor], T], starts: Tensor) -> T:
    """Return `find(starts)`, found once for all layers of a micro-batch: on CUDA it waits for the device."""
    if starts.is_inference():  # such tensors do not tell whether they were changed
        return find(starts)
    version, found = _found.get(starts, (None, {}))
    if version != starts._version:
        found = {}
        _found[starts] = (starts._version, found)
    if find not in found:
        found[find] = find(starts)
    result: T = found[find]
    return result


def _bounds(starts: Tensor) -> list[list[int]]:
    """Of each row the positions at which documents begin, and the row's end."""
    rows, length = starts.shape
    first = starts == torch.arange(length, device=starts.device)
    return [[*places.nonzero().flatten().tolist(), length] for places in first]


def _ends(starts: Tensor) -> tuple[Tensor, int]:
    """Document boundaries in all rows joined, int32 [documents + 1], and the length of the longest document."""
    rows, length = starts.shape
    first = (starts == torch.arange(length, device=starts.device)).flatten().nonzero().flatten()
    ends = torch.cat([first, first.new_tensor([rows * length])]).to(torch.int32)
    return ends, int(ends.diff().max())


def _by_flash(query: Tensor, key: Tensor, value: Tensor, starts: Tensor, scale: float) -> Tensor:
    length, rows = query.shape[:2]
    ends, longest = _once(_ends, starts)
    q, k, v = (tensor.transpose(0, 1).flatten(0, 1) for tensor in (query, key, value))
    context = flash_attn_varlen_func(
        q,
        k,
        v,
        ends,
        ends,
        longest,
        longest,
        softmax_scale=scale,
        causal=True,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return context.unflatten(0, (rows, length)).transpose(0, 1)
