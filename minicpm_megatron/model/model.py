"""MiniCPMModel: Megatron-Core's GPTModel with MiniCPM's block, and a loss that needs no logits."""

from __future__ import annotations

from typing import Any

from megatron.core.models.gpt import GPTModel
from torch import Tensor

from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.ends import MiniCPMEnds
from minicpm_megatron.model.layer_spec import block_of, layer_spec


class MiniCPMModel(MiniCPMEnds, GPTModel):
    """MiniCPM on Megatron-Core.

    Usable without the trainer: any rank of an initialised `parallel_state` builds its part with
    `MiniCPMModel(config)`; `initialize_parameters` then sets weights that are the same whatever the layout.

    Args:
        config: shape, multipliers and layout.
        keywords: passed on to GPTModel: pre_process, post_process, parallel_output, pg_collection, vp_stage.

    Raises:
        UserError: any other keyword, or a config that these modules cannot follow.
    """

    def __init__(self, config: MiniCPMConfig, **keywords: Any) -> None:
        self.check_keywords(keywords)
        super().__init__(
            config=config,
            transformer_layer_spec=block_of(layer_spec(config, keywords.get("vp_stage"))),
            **self.arguments(config),
            **keywords,
        )
        self.replace_ends()

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Loss per token, or logits without labels.

        Args:
            input_ids: int64 [b, s].
            position_ids: unused by rotary positions; GPTModel's signature.
            attention_mask: unused by causal attention; GPTModel's signature.
            keywords: `labels` int64 [b, s], `loss_mask` [b, s] and whatever else GPTModel.forward takes.

        Returns:
            With labels: fp32 [b, s], the cross-entropy in nats of every token, times its mask if there is one and
            the loss is fused. Without: logits [b, s, padded vocabulary over the tensor-parallel ranks] in the model's
            dtype.
        """
        return super().forward(input_ids, position_ids, attention_mask, **keywords)

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None = None, loss_mask: Tensor | None = None, **keywords: Any
    ) -> Tensor:
        """What GPTModel does after the last layer; with labels it would make logits first.

        Megatron-Core 0.19 also has an `output_processor`, which every call of the model would have to pass.
        """
        processed = keywords.get("output_processor") is not None  # the caller's own loss, in the place of all below
        if labels is None or not self.post_process or not self.config.fused_loss or processed:
            return super()._postprocess(hidden_states=hidden_states, labels=labels, loss_mask=loss_mask, **keywords)
        return self.fused_losses(hidden_states, labels, loss_mask)
