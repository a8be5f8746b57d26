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
    def taking_over(cls, linear: torch.nn.Module) -> LanguageModelHead:
        """A head with the weight and the settings of the ColumnParallelLinear that GPTModel or HybridModel has built.

        Megatron-Core 0.19 builds the head in its constructor and takes no other. Delete this, and give the head to the
        constructor, once it takes a module or a spec for its output layer.
        """
        assert isinstance(linear, ColumnParallelLinear) and linear.bias is None
        head = cls(
            linear.input_size,
            linear.output_size,
            config=linear.config,
            init_method=linear.config.init_method,
            bias=False,
            gather_output=linear.gather_output,
            skip_bias_add=linear.skip_bias_add,
            skip_weight_param_allocation=True,  # draws nothing: the weight is taken over, if there is one
            embedding_activation_buffer=linear.embedding_activation_buffer,
            grad_output_buffer=linear.grad_output_buffer,
            tp_group=linear.tp_group,
        )
        head.weight = linear.weight
        return head

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
