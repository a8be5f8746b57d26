"""The attention core of the spec: flash-attn where it is installed and fits, torch's SDPA everywhere else, and ring
or Ulysses attention where context parallelism divides the sequence.

Both compute softmax(q k^T / sqrt(d_head)) v with grouped key/value heads; MiniCPM does not use muP's 1/d scaling of
attention (section 3.1 of arXiv 2404.06395).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.context_parallel import ring_attention, ulysses_attention
from minicpm_megatron.model.document_attention import document_attention

try:
    from flash_attn import flash_attn_func
except ImportError:
    flash_attn_func = None


class MiniCPMCoreAttention(torch.nn.Module):
    """Causal attention of one tensor-parallel rank's heads, as a Megatron-Core `core_attention` spec."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.across_ranks = None
        if config.context_parallel_size > 1:
            self.across_ranks = ulysses_attention if config.cp_comm_type == "a2a" else ring_attention
        self.attn_mask_type = attn_mask_type
        assert config.kv_channels is not None
        self.softmax_scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s_q, b, heads, d_head] in the dtype of the model.
            key, value: [s_k, b, groups, d_head]; heads is a multiple of groups.
            attention_mask: where attn_mask_type is causal, None or the `starts` of packed documents, int [b, s]
                (see `document_attention`); or, as Megatron-LM's data loader makes it, bool [b, 1, s_q, s_k] where True
                hides, causality included. Where attn_mask_type is neither causal nor no_mask, the last.
            attn_mask_type: causal, or no_mask where one new token attends to a cache.

        Returns:
            [s_q, b, heads x d_head].
        """
        if attention_bias is not None or packed_seq_params is not None:
            raise UserError(
                "MiniCPM's attention takes no attention bias and no packed_seq_params",
                fix="leave out --sft and --dataloader-inter-document-masking",
            )
        mask_type = attn_mask_type or self.attn_mask_type
        causal = mask_type == AttnMaskType.causal
        if self.across_ranks is not None:
            if not causal:
                raise NotImplementedError(f"attention of type {mask_type} over context-parallel ranks")
            if attention_mask is not None and attention_mask.dtype == torch.bool:
                raise UserError(
                    "context-parallel attention takes no mask of the whole sequence",
                    fix="give --no-create-attention-mask-in-dataloader",
                )
            group = parallel_state.get_context_parallel_group()
            context = self.across_ranks(query, key, value, group=group, scale=self.softmax_scale, starts=attention_mask)
            return context.reshape(context.size(0), context.size(1), -1)
        whole_mask = attention_mask is not None and attention_mask.dtype == torch.bool
        if causal and attention_mask is not None and not whole_mask:
            context = document_attention(query, key, value, attention_mask, self.softmax_scale)
            return context.reshape(context.size(0), context.size(1), -1)
        causal = causal and not whole_mask
        if self._flash_fits(query, causal or mask_type == AttnMaskType.no_mask):
            context = flash_attn_func(
                query.transpose(0, 1),
                key.transpose(0, 1),
                value.transpose(0, 1),
                softmax_scale=self.softmax_scale,
                causal=causal,
                deterministic=torch.are_deterministic_algorithms_enabled(),
            ).transpose(0, 1)
        else:
            # [s, b, n, d] -> [b, n, s, d]
            q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
            mask = None
            if not causal and mask_type != AttnMaskType.no_mask:
                if attention_mask is None:
                    raise ValueError(f"attention of type {mask_type} needs a mask")
                mask = ~attention_mask
            context = F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=causal,
                scale=self.softmax_scale,
                enable_gqa=q.size(1) != k.size(1),
            ).permute(2, 0, 1, 3)
        return context.reshape(context.size(0), context.size(1), -1)

    @staticmethod
    def _flash_fits(query: Tensor, known_mask: bool) -> bool:
        half = query.dtype in (torch.bfloat16, torch.float16)
        return flash_attn_func is not None and query.is_cuda and half and known_mask
