"""torch's scaled_dot_product_attention, which chooses a fused kernel of its own for the device."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from minicpm_megatron.model.document_attention import document_attention_by_sdpa


def sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """As `AttentionKernel`; packed documents one after another."""
    if starts is not None:
        return document_attention_by_sdpa(query, key, value, starts, scale)
    # [s, b, n, d] -> [b, n, s, d]
    q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=None if mask is None else ~mask,
        is_causal=causal,
        scale=scale,
        enable_gqa=q.size(1) != k.size(1),
    ).permute(2, 0, 1, 3)


KERNEL = sdpa
