"""MiniCPMConfig: Megatron-Core's TransformerConfig plus the constants that make it MiniCPM."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.mup import mup_table
from minicpm_megatron.recipe import ModelRecipe, ParallelRecipe, RopeScaling

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# role of the muP table -> fields of TransformerConfig; `initialize_parameters` draws the same for every layout
INIT_METHODS = {"hidden": ("init_method", "output_layer_init_method"), "embedding": ("embedding_init_method",)}


@dataclass
class MiniCPMConfig(TransformerConfig):
    """A TransformerConfig that knows MiniCPM's multipliers (Table 7 of arXiv 2404.06395).

    Build it with `from_recipe`; the extra fields have the meaning and the units of `recipe.ModelRecipe`.
    """

    vocab_size: int = 0
    max_position_embeddings: int = 4096
    rotary_base: float = 10_000.0
    rope_scaling: RopeScaling = RopeScaling()
    untie_embeddings_and_output_weights: bool = False
    scale_emb: float = 1.0
    scale_depth: float = 1.0
    dim_model_base: int = 256
    parametrization: Literal["mup", "standard"] = "mup"
    embedding_role: Literal["vector", "matrix"] = "vector"
    fused_loss: bool = True
    """The loss is computed with the LM head, without logits (`fused_loss.VocabParallelLinearCrossEntropy`); False:
    from whole logits, which is the reference."""
    make_vocab_size_divisible_by: int = 128
    """Rows of the embedding a rank holds are padded to a multiple of this (Megatron-LM's name and default). Padding
    is all zero, gets no probability and never leaves the model, so that results do not depend on it."""

    def __post_init__(self) -> None:
        if self.use_mup:
            raise UserError(
                "Megatron-Core's own use_mup is on, which would scale widths twice",
                where="MiniCPMConfig.use_mup",
                fix="leave it False; MiniCPM's scaling is in scale_emb, scale_depth and dim_model_base",
            )
        # Megatron-Core would draw all matrices with one deviation and divide that of block outputs by sqrt(2 layers)
        table = mup_table(self)
        for role, names in INIT_METHODS.items():
            for name in names:
                if getattr(self, name) is None:
                    setattr(self, name, _normal(table[role].init_std))
        super().__post_init__()

    def padded_vocab_size(self, tensor_model_parallel_size: int | None = None) -> int:
        """Rows of the embedding over all tensor-parallel ranks, padding included."""
        ranks = tensor_model_parallel_size or self.tensor_model_parallel_size
        unit = self.make_vocab_size_divisible_by * ranks
        return -(-self.vocab_size // unit) * unit

    @classmethod
    def from_recipe(
        cls,
        model: ModelRecipe,
        parallel: ParallelRecipe | None = None,
        *,
        precision: Literal["fp32", "bf16"] = "fp32",
        recompute: Literal["none", "selective", "full"] = "none",
        **overrides: Any,
    ) -> MiniCPMConfig:
        """The config of a model shape under a layout.

        Args:
            model: shape and muP constants, for instance `minicpm_megatron.presets["minicpm-2.4b"]`.
            parallel: sizes of the model-parallel groups; default: none.
            precision: dtype of parameters and activations.
            recompute: activations computed again in backward.
            overrides: any other TransformerConfig field.
        """
        parallel = parallel or ParallelRecipe()
        fields: dict[str, Any] = dict(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            layernorm_epsilon=model.norm_epsilon,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=F.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            init_method_std=model.init_method_std,
            params_dtype=PRECISIONS[precision],
            bf16=precision == "bf16",
            pipeline_dtype=PRECISIONS[precision],
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            cp_comm_type=parallel.cp_comm_type,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            use_cpu_initialization=not torch.cuda.is_available(),
            # fusions here are CUDA extensions of apex or Transformer Engine, which the spec does not use
            bias_dropout_fusion=False,
            bias_activation_fusion=False,
            masked_softmax_fusion=False,
            gradient_accumulation_fusion=False,
            apply_rope_fusion=False,
            **_recompute_fields(recompute),
            **_expert_fields(model, parallel),
            vocab_size=model.vocab_size,
            max_position_embeddings=model.max_position_embeddings,
            rotary_base=model.rotary_base,
            rope_scaling=model.rope_scaling,
            untie_embeddings_and_output_weights=model.untie_embeddings_and_output_weights,
            scale_emb=model.scale_emb,
            scale_depth=model.scale_depth,
            dim_model_base=model.dim_model_base,
            parametrization=model.parametrization,
            embedding_role=model.embedding_role,
        )
        return cls(**{**fields, **overrides})


def _normal(std: float | None) -> Any:
    assert std is not None, "only norm weights start as ones"

    def initialize(tensor: torch.Tensor) -> torch.Tensor:
        return torch.nn.init.normal_(tensor, mean=0.0, std=std)

    return initialize


def _expert_fields(model: ModelRecipe, parallel: ParallelRecipe) -> dict[str, Any]:
    if model.num_moe_experts is None:
        return {}
    # the all-to-all gathers unequal parts over tensor-parallel ranks, which gloo cannot
    all_to_all = torch.cuda.is_available() or parallel.tensor_model_parallel_size == 1
    return {
        "num_moe_experts": model.num_moe_experts,
        "moe_router_topk": model.moe_router_topk,
        "moe_ffn_hidden_size": model.mlp_width,
        "moe_router_load_balancing_type": model.moe_router_load_balancing_type,
        "moe_aux_loss_coeff": model.moe_aux_loss_coeff,
        "moe_z_loss_coeff": model.moe_z_loss_coeff or None,
        "moe_router_pre_softmax": model.moe_router_pre_softmax,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall" if all_to_all else "allgather",
    }


def _recompute_fields(recompute: str) -> dict[str, Any]:
    if recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {}
