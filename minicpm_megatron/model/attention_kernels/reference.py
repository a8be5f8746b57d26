"""The reference that other kernels are compared with: all scores at once, in fp32 or wider."""

from __future__ import annotations

import torch
from torch import Tensor

from minicpm_megatron.model.attention_kernel import hidden_keys


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """As `AttentionKernel`, written out. Its memory grows with s_q x s_k: for short sequences and tests."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    queries = query.to(dtype).unflatten(2, (key.size(2), -1))  # [s_q, b, groups, heads / groups, d]
    scores = scale * torch.einsum("qbgrd,kbgd->bgrqk", queries, key.to(dtype))
    hidden = hidden_keys(query, key, causal, mask, starts)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, :, None], float("-inf"))
    context = torch.einsum("bgrqk,kbgd->qbgrd", scores.softmax(-1), value.to(dtype))
    return context.flatten(2, 3).to(query.dtype)  # [s_q, b, heads, d]


KERNEL = reference
