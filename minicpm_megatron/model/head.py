"""The LM head: logits as Megatron-Core's ColumnParallelLinear makes them, or losses without making them."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear
from torch import Tensor

from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.fused_loss import VocabParallelLinearCrossEntropy


class LanguageModelHead(ColumnParallelLinear):
    """A ColumnParallelLinear that also knows the loss of its logits.

    The loss is asked of this module, and not of its weight, because DeepSpeed gathers weights around modules.
    """

    config: MiniCPMConfig

    @classmethod
    def of(cls, linear: torch.nn.Module) -> LanguageModelHead:
        """`linear`, a ColumnParallelLinear, made one: GPTModel builds its head itself and takes no other."""
        assert isinstance(linear, ColumnParallelLinear)
        linear.__class__ = cls
        assert isinstance(linear, cls)
        return linear

    @classmethod
    def build(cls, config: MiniCPMConfig, *, tied: bool) -> LanguageModelHead:
        """A head with weights of its own, or (tied) one that is given them with every call."""
        return cls(
            config.hidden_size,
            config.padded_vocab_size(),
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            skip_weight_param_allocation=tied,
        )

    def forward(
        self,
        input_: Tensor,
        weight: Tensor | None = None,
        runtime_gather_output: bool | None = None,
        *,
        labels: Tensor | None = None,
        loss_mask: Tensor | None = None,
    ) -> Any:
        """ColumnParallelLinear's (logits, bias); with labels the losses.

        Args:
            input_: [s, b, H] after the final norm; s is a rank's own part under sequence parallelism.
            weight: [local vocabulary, H] where the head is tied.
            labels: int64 [b, s] of the whole sequence.
            loss_mask: [b, s], a factor on each token's loss.

        Returns:
            With labels fp32 [b, s] in nats.
        """
        if labels is None:
            return super().forward(input_, weight, runtime_gather_output)
        loss = VocabParallelLinearCrossEntropy(
            reduction="none",
            z_loss=self.config.z_loss_coeff if self.training else 0.0,
            vocab_size=self.config.vocab_size,
            group=self.tp_group,
            sequence_parallel=self.sequence_parallel,
        )
        mask = None if loss_mask is None else loss_mask.transpose(0, 1)
        losses = loss(input_, self.weight if weight is None else weight, labels.transpose(0, 1), mask)
        return losses.transpose(0, 1).contiguous()
