"""The attention core of the spec: the kernel that the config names, and ring or Ulysses attention where context
parallelism divides the sequence.

All compute softmax(q k^T / sqrt(d_head)) v with grouped key/value heads; MiniCPM does not use muP's 1/d scaling of
attention (section 3.1 of arXiv 2404.06395).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.attention_kernel import AttentionKernel
from minicpm_megatron.model.config import DEFAULT_ATTENTION_KERNEL
from minicpm_megatron.model.context_parallel import ring_attention, ulysses_attention
from minicpm_megatron.registry import ATTENTION_KERNELS


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
        # a TransformerConfig of Megatron-LM's trainer has no such field
        name = getattr(config, "attention_kernel", DEFAULT_ATTENTION_KERNEL)
        self.kernel: AttentionKernel = ATTENTION_KERNELS.get(name)
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
        starts = None
        if causal and attention_mask is not None:
            if attention_mask.dtype == torch.bool:
                causal = False  # the mask has causality in it
            else:
                starts = attention_mask
        mask = None
        if not causal and mask_type != AttnMaskType.no_mask:
            if attention_mask is None:
                raise ValueError(f"attention of type {mask_type} needs a mask")
            mask = attention_mask
        context = self.kernel(query, key, value, scale=self.softmax_scale, causal=causal, mask=mask, starts=starts)
        return context.reshape(context.size(0), context.size(1), -1)
