"""MiniCPM registered into Megatron-Core through its own extension points: a spec provider and layer specs.

    from megatron.core.models.gpt import GPTModel
    model = GPTModel(config, get_minicpm_block_spec(config), ...)

Everything that makes the block MiniCPM is inside the spec, so that plain `GPTModel` trains the right model: the first
layer multiplies the embeddings by scale_emb, every bias-dropout-add multiplies the block's output by
scale_depth / sqrt(num_layers), and the final norm divides by m before the LM head (Table 7 of arXiv 2404.06395).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor

from minicpm_megatron.model.attention import MiniCPMCoreAttention
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.experts import get_experts_spec
from minicpm_megatron.model.norm import MiniCPMFinalNorm, MiniCPMRMSNorm


class MiniCPMSpecProvider(LocalSpecProvider):
    """Megatron-Core's local linears with MiniCPM's norm and attention core; runs on CPU and CUDA alike."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return MiniCPMRMSNorm

    def core_attention(self) -> type:
        return MiniCPMCoreAttention


class MiniCPMTransformerLayer(TransformerLayer):
    """A TransformerLayer whose first instance scales the embeddings it is given."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As TransformerLayer; hidden_states is [s, b, hidden_size]."""
        if self.layer_number == 1:
            hidden_states = hidden_states * self.config.scale_emb
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


def get_minicpm_layer_spec(config: MiniCPMConfig) -> ModuleSpec:
    """The spec of one MiniCPM layer.

    Args:
        config: gives the residual multiplier, and says whether there are experts in the place of the MLP.
    """
    backend = MiniCPMSpecProvider()
    sparse = config.num_moe_experts is not None
    bias_dropout_add = scaled_bias_dropout_add(config.residual_multiplier)
    return ModuleSpec(
        module=MiniCPMTransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.layer_norm(),
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=backend.core_attention(),
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=IdentityOp,
                    k_layernorm=IdentityOp,
                ),
            ),
            self_attn_bda=bias_dropout_add,
            pre_mlp_layernorm=backend.layer_norm(),
            mlp=get_experts_spec(backend) if sparse else get_mlp_module_spec_for_backend(backend=backend),
            mlp_bda=bias_dropout_add,
        ),
    )


def get_minicpm_block_spec(config: MiniCPMConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, as `GPTModel`'s transformer_layer_spec."""
    layers = get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(
        layer_specs=[get_minicpm_layer_spec(config)] * layers, layer_norm=MiniCPMFinalNorm
    )
