"""The transformer layer of MiniCPM: Megatron-Core's, with the multipliers of Table 7 (arXiv 2404.06395)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.identity_op import IdentityFuncOp
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from minicpm_megatron.errors import require
from minicpm_megatron.model.multipliers import multipliers_of
from minicpm_megatron.model.plain_positions import PositionWatch
from minicpm_megatron.model.supported import check_supported


class MiniCPMTransformerLayer(TransformerLayer):
    """A TransformerLayer that scales what its blocks add to the residual; the first one scales the embeddings.

    It reads the multipliers from its config when it is built, so that one spec serves every config. Where the spec has
    an attention block only, or an MLP only (the layers of `HybridModel`), it is a layer of that one block.

    Args:
        in_plain_model: whether a GPTModel or HybridModel of Megatron-Core's is around it, whose rotary positions its
            caller's arguments decide; the first layer then compares them with the config.
        spec_shape: num_layers and num_moe_experts of the config that the spec was made from; None: not to be compared.

    Raises:
        UserError: the config does not know the multipliers, or asks for something that these modules would ignore; the
            spec was made from another config; in forward, the positions are not the config's.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        *arguments: Any,
        in_plain_model: bool = False,
        spec_shape: tuple[int, int | None] | None = None,
        **keywords: Any,
    ) -> None:
        check_supported(config)
        require(
            spec_shape in (None, (config.num_layers, config.num_moe_experts)),
            "MiniCPM's layer spec",
            "was made from another config than the model's",
            "give the function of the spec the config that the model is given",
        )
        multipliers = multipliers_of(config)
        super().__init__(config, submodules, *arguments, **keywords)
        self.embedding_multiplier = multipliers.embedding
        self._watch = PositionWatch(config) if in_plain_model and self.layer_number == 1 else None
        bias_dropout_add = scaled_bias_dropout_add(multipliers.residual)
        # Megatron-Core's own adds stand in the spec; a block that the layer lacks has an IdentityFuncOp there
        for name in ("self_attn_bda", "mlp_bda"):
            if not isinstance(getattr(self, name), IdentityFuncOp):
                setattr(self, name, bias_dropout_add)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer; hidden_states is [s, b, hidden_size]."""
        if self._watch is not None:
            self._watch.check(kwargs)
        if self.layer_number == 1:
            hidden_states = hidden_states * self.embedding_multiplier
        return super().forward(hidden_states, *args, **kwargs)


def scaled_bias_dropout_add(multiplier: float) -> Callable[[bool, bool], Callable[..., Tensor]]:
    """A bias-dropout-add builder: residual + multiplier x dropout(output + bias)."""

    def builder(training: bool, fused: bool) -> Callable[..., Tensor]:
        def bias_dropout_add(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float) -> Tensor:
            output, bias = output_with_bias
            if bias is not None:
                output = output + bias
            return torch.add(residual, F.dropout(output, p=prob, training=training), alpha=multiplier)

        return bias_dropout_add

    return builder
