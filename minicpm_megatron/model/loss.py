"""The loss of a language model whose vocabulary is divided over the tensor-parallel ranks."""

from __future__ import annotations

import torch
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from minicpm_megatron.model.config import MiniCPMConfig


def token_losses(config: MiniCPMConfig, logits: Tensor, labels: Tensor, *, training: bool) -> Tensor:
    """Cross-entropy of every token; vocabulary padding gets no probability.

    Args:
        logits: [s, b, local vocabulary], or [s, b, padded vocabulary] where they were gathered.
        labels: int64 [b, s].
        training: whether the config's z-loss is added.

    Returns:
        fp32 [b, s] in nats.
    """
    if logits.size(-1) == config.padded_vocab_size() and config.tensor_model_parallel_size > 1:
        # GPTModel(parallel_output=False) or runtime_gather_output=True: Megatron-Core's loss would take them for
        # this rank's part. Backward gathers the parts' gradients, of which gather's backward keeps this rank's.
        logits = tensor_parallel.scatter_to_tensor_model_parallel_region(logits)  # [s, b, local vocabulary]
    logits = logits.float()
    padding = _padding_columns(config, logits.size(-1))
    if padding:
        logits[..., -padding:] = torch.finfo(logits.dtype).min
    z_loss = _z_loss(config.z_loss_coeff, logits) if training and config.z_loss_coeff else None
    losses = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.transpose(0, 1).contiguous())
    if z_loss is not None:
        losses = losses + z_loss
    return losses.transpose(0, 1).contiguous()


def _z_loss(coefficient: float, logits: Tensor) -> Tensor:
    """coefficient x (log-sum-exp over the whole vocabulary)^2, [s, b], of [s, b, local vocabulary]."""
    # a copy: Megatron-Core 0.19's cross-entropy subtracts the maximum from the logits in place
    own = logits.clone().logsumexp(-1, keepdim=True)  # [s, b, 1]
    every = tensor_parallel.gather_from_tensor_model_parallel_region(own)  # [s, b, tensor-parallel ranks]
    return coefficient * every.logsumexp(-1).square()


def _padding_columns(config: MiniCPMConfig, local_columns: int) -> int:
    """How many of this rank's last vocabulary columns stand for no token."""
    first = parallel_state.get_tensor_model_parallel_rank() * local_columns
    return local_columns - min(local_columns, max(0, config.vocab_size - first))
