"""An attention kernel is a function of query, key and value that autograd can differentiate.

This one attends a few rows of queries at a time, so that scores of the whole sequence never exist at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minicpm_megatron.model.attention_kernel import hidden_keys
from minicpm_megatron.model.attention_kernels.reference import reference

ROWS = 16


def by_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """softmax(scale q k^T) v; shapes as in `minicpm_megatron.model.attention_kernel`."""
    hidden = hidden_keys(query, key, causal, mask, starts)  # bool [b or 1, 1, s_q, s_k], or None
    parts = []
    for first in range(0, query.size(0), ROWS):
        rows = slice(first, first + ROWS)
        part = None if hidden is None else hidden[:, :, rows]
        parts.append(reference(query[rows], key, value, scale=scale, mask=part))
    return torch.cat(parts)  # [s_q, b, heads, d]
