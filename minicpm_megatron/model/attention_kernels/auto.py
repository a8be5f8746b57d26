"""flash-attn where it is installed and fits, torch's SDPA everywhere else."""

from __future__ import annotations

import torch
from torch import Tensor

from minicpm_megatron.model.attention_kernels.sdpa import sdpa
from minicpm_megatron.model.document_attention import document_attention

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


def auto(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
    starts: Tensor | None = None,
) -> Tensor:
    """As `AttentionKernel`."""
    if starts is not None:
        return document_attention(query, key, value, starts, scale)
    if mask is None and _flash_fits(query):
        context: Tensor = flash_attn_func(
            query.transpose(0, 1),
            key.transpose(0, 1),
            value.transpose(0, 1),
            softmax_scale=scale,
            causal=causal,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        ).transpose(0, 1)
        return context
    return sdpa(query, key, value, scale=scale, causal=causal, mask=mask)


def _flash_fits(query: Tensor) -> bool:
    return flash_attn_func is not None and query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)


KERNEL = auto
