"""What an attention kernel computes. Each kernel of ours is one file of `model/attention_kernels/`; another package
declares one in the entry-point group `minicpm_megatron.attention_kernels`. `training.attention_kernel` names it.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class AttentionKernel(Protocol):
    """softmax(scale q k^T) v over the keys that a query sees, on one rank's heads, with its backward pass.

    Which keys a query sees is said in one of four ways: `causal`, `mask`, `starts`, or none of them, which is all keys.
    """

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        causal: bool = False,
        mask: Tensor | None = None,
        starts: Tensor | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: [s_q, b, heads, d], fp32, bf16 or fp16.
            key, value: [s_k, b, groups, d]; heads is a multiple of groups.
            scale: factor on q k^T.
            causal: query i sees keys 0 to i; s_q = s_k.
            mask: bool [b or 1, 1, s_q, s_k], True where a key is hidden.
            starts: int [b, s], of each token the position at which its document begins; query i sees the keys from
                there to i (`document_attention`).

        Returns:
            [s_q, b, heads, d] in the dtype of query.
        """
        ...


def as_kernel(entry: Any) -> AttentionKernel:
    """`entry`, which must be a function.

    Raises:
        TypeError: it is none.
    """
    if not callable(entry) or isinstance(entry, type):
        raise TypeError(f"an attention kernel must be a function, not {entry!r}")
    kernel: AttentionKernel = entry
    return kernel


def hidden_keys(query: Tensor, key: Tensor, causal: bool, mask: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """The three ways to say which keys are hidden as one: bool [b or 1, 1, s_q, s_k], or None where all are seen.

    Args:
        query, key, causal, mask, starts: as an `AttentionKernel` takes them.
    """
    if mask is not None or not (causal or starts is not None):
        return mask
    queries, keys = (torch.arange(tensor.size(0), device=query.device) for tensor in (query, key))
    hidden = (keys > queries[:, None])[None]  # [1, s_q, s_k]
    if starts is not None:
        hidden = hidden | (keys < starts[:, :, None])  # [b, s_q, s_k]
    return hidden[:, None]
