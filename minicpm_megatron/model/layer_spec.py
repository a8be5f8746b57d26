"""MiniCPM registered into Megatron-Core through its own extension points: a spec provider and layer specs.

    from megatron.core.models.gpt import GPTModel
    model = GPTModel(config, get_minicpm_block_spec(config), ...)

or, on Megatron-LM's command line,

    --spec minicpm_megatron.model.layer_spec get_minicpm_block_spec

Everything that makes the block MiniCPM is inside the spec, so that plain `GPTModel` trains the right model: the first
layer multiplies the embeddings by scale_emb, every bias-dropout-add multiplies the block's output by
scale_depth / sqrt(num_layers), and the final norm divides by m before the LM head (Table 7 of arXiv 2404.06395).
"""

from __future__ import annotations

from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.attention import MiniCPMCoreAttention
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.experts import get_experts_spec
from minicpm_megatron.model.layer import MiniCPMTransformerLayer
from minicpm_megatron.model.multipliers import multipliers_of
from minicpm_megatron.model.norm import MiniCPMFinalNorm, MiniCPMHeadNorm, MiniCPMRMSNorm
from minicpm_megatron.model.spec_function import spec_function
from minicpm_megatron.model.supported import check_plain_model, check_supported
from minicpm_megatron.parallel import device


class MiniCPMSpecProvider(LocalSpecProvider):
    """Megatron-Core's local linears with MiniCPM's norm and attention core; runs on CPU and CUDA alike."""

    def layer_norm(self, rms_norm: bool = True, for_qk: bool = False) -> type:
        return MiniCPMRMSNorm

    def core_attention(self) -> type:
        return MiniCPMCoreAttention


class MiniCPMLayerSpec(ModuleSpec, TransformerBlockSubmodules):
    """The spec of one layer, and of a block of such layers.

    Megatron-Core 0.19 takes a layer's spec for a whole model, too, and then puts its own final norm behind the layers,
    which knows no 1 / m. Being a block's spec at the same time, this one keeps the final norm.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vp_stage: int | None,
        submodules: TransformerLayerSubmodules,
        params: dict[str, Any],
    ) -> None:
        ModuleSpec.__init__(self, module=MiniCPMTransformerLayer, params=params, submodules=submodules)
        self.layer_norm = MiniCPMFinalNorm
        self._config, self._vp_stage = config, vp_stage

    @property
    def layer_specs(self) -> list[ModuleSpec]:
        """One spec for each layer of this pipeline stage."""
        if self._vp_stage is None and self._config.virtual_pipeline_model_parallel_size is not None:
            raise UserError(
                "a virtual pipeline stage is not named",
                where="MiniCPM's layer spec",
                fix="give GPTModel get_minicpm_block_spec(config, vp_stage)",
            )
        return [self] * get_num_layers_to_build(self._config, self._vp_stage)


def attention_submodules(backend: LocalSpecProvider, *, qk_layernorm: bool = False) -> dict[str, Any]:
    """The attention block of a layer, as fields of TransformerLayerSubmodules."""
    head_norm = MiniCPMHeadNorm if qk_layernorm else IdentityOp
    return {
        "input_layernorm": backend.layer_norm(),
        "self_attention": ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=backend.column_parallel_linear(),
                core_attention=backend.core_attention(),
                linear_proj=backend.row_parallel_linear(),
                q_layernorm=head_norm,
                k_layernorm=head_norm,
            ),
        ),
        "self_attn_bda": get_bias_dropout_add,
    }


def mlp_submodules(backend: LocalSpecProvider, *, sparse: bool) -> dict[str, Any]:
    """The MLP, or the experts in its place, as fields of TransformerLayerSubmodules."""
    return {
        "pre_mlp_layernorm": backend.layer_norm(),
        "mlp": get_experts_spec(backend) if sparse else get_mlp_module_spec_for_backend(backend=backend),
        "mlp_bda": get_bias_dropout_add,
    }


@spec_function
def get_minicpm_layer_spec(config: TransformerConfig, vp_stage: int | None = None) -> MiniCPMLayerSpec:
    """The spec of one MiniCPM layer; as GPTModel's transformer_layer_spec the whole block with its final norm.

    Args:
        config: says whether there are experts in the place of the MLP, and how many layers a block has. Megatron-LM's
            `GPTModelConfig` serves as well.
        vp_stage: which virtual pipeline stage the block is.

    Raises:
        UserError: the config holds a setting that these modules would ignore, or no constants of muP.
    """
    inner = getattr(config, "transformer", config)
    if inner is not config and isinstance(inner, MiniCPMConfig) and getattr(config, "vocab_size", 0) is None:
        # it has written its own vocab_size, rotary_base and rope_scaling into the MiniCPMConfig
        raise UserError(
            f"{type(config).__name__} cannot hold a MiniCPMConfig",
            where="MiniCPM's layer spec",
            fix="build it with minicpm_model_config_from_args (minicpm_megatron.megatron_lm), or give it a "
            "TransformerConfig",
        )
    check_plain_model(inner)
    shape = (inner.num_layers, inner.num_moe_experts)
    return layer_spec(inner, vp_stage, in_plain_model=True, spec_shape=shape)


def layer_spec(config: TransformerConfig, vp_stage: int | None = None, **params: Any) -> MiniCPMLayerSpec:
    """`get_minicpm_layer_spec` for MiniCPM's own models; `params` are arguments of `MiniCPMTransformerLayer`."""
    device.patch_megatron()  # a TransformerConfig, which is no MiniCPMConfig, has not done it
    check_supported(config)
    multipliers_of(config)  # refused here in one line, where a module's constructor would wrap it
    backend = MiniCPMSpecProvider()
    sparse = config.num_moe_experts is not None
    submodules = TransformerLayerSubmodules(
        **attention_submodules(backend, qk_layernorm=config.qk_layernorm), **mlp_submodules(backend, sparse=sparse)
    )
    return MiniCPMLayerSpec(config, vp_stage, submodules, params)


@spec_function
def get_minicpm_block_spec(config: TransformerConfig, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """The layers of this pipeline stage and the final norm, as `GPTModel`'s transformer_layer_spec.

    Args:
        config: as for `get_minicpm_layer_spec`.
        vp_stage: which virtual pipeline stage the block is.

    Raises:
        UserError: as `get_minicpm_layer_spec`.
    """
    return block_of(get_minicpm_layer_spec(config, vp_stage))


def block_of(layer: MiniCPMLayerSpec) -> TransformerBlockSubmodules:
    """The block of such layers, counted."""
    return TransformerBlockSubmodules(layer_specs=layer.layer_specs, layer_norm=layer.layer_norm)
