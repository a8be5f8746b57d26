"""RMSNorm that is right under sequence parallelism, with the LM head's muP factor folded into the last one."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from minicpm_megatron.model.multipliers import multipliers_of


class MiniCPMRMSNorm(torch.nn.Module):
    """x / rms(x) x weight over the last dimension, as a Megatron-Core norm spec.

    Under sequence parallelism a rank sees a part of the sequence, so the weight's gradient is a part too and must be
    summed over the tensor-parallel group. Sending the weight through `copy_to_tensor_model_parallel_region` does that
    inside autograd; an optimizer hook, as Megatron-LM has it, would never run under DeepSpeed.
    """

    output_multiplier = 1.0

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__()
        self.eps = eps
        self.sums_gradient = config.sequence_parallel
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype, device=device))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """[..., hidden_size] -> the same shape and dtype."""
        weight = self.weight
        if self.sums_gradient:
            weight = copy_to_tensor_model_parallel_region(weight)
        normed = F.rms_norm(hidden_states, weight.shape, weight, self.eps)
        return normed if self.output_multiplier == 1.0 else normed * self.output_multiplier


class MiniCPMHeadNorm(MiniCPMRMSNorm):
    """The norm of each head's queries or keys, [..., heads, d_head].

    A tensor-parallel rank has a part of the heads, so the gradient of the shared weight is a part, with and without
    sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        self.sums_gradient = config.tensor_model_parallel_size > 1


class MiniCPMFinalNorm(MiniCPMRMSNorm):
    """The norm before the LM head, times 1 / m.

    Scaling the hidden state gives the logits of Table 7 (arXiv 2404.06395); scaling the logits themselves would cost
    a copy of the largest tensor in the model.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> None:
        super().__init__(config, hidden_size, eps)
        self.output_multiplier = 1.0 / multipliers_of(config).width
