"""MiniCPMConfig: Megatron-Core's TransformerConfig plus the constants that make it MiniCPM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.methods.mup import mup_table
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import ModelRecipe, ParallelRecipe, Recipe, RopeScaling, TrainingRecipe
from minicpm_megatron.recipe.memory import VOCABULARY_MULTIPLE

DEFAULT_ATTENTION_KERNEL: str = TrainingRecipe.model_fields["attention_kernel"].default
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# role of the muP table -> fields of TransformerConfig; `initialize_parameters` draws the same for every layout
INIT_METHODS = {"hidden": ("init_method", "output_layer_init_method"), "embedding": ("embedding_init_method",)}


def _default(name: str) -> Any:
    """The default of a model's key in a recipe, where the constants of the paper stand."""
    return ModelRecipe.model_fields[name].default


@dataclass
class MiniCPMConfig(TransformerConfig):
    """A TransformerConfig that knows MiniCPM's multipliers (Table 7 of arXiv 2404.06395).

    `from_recipe` builds it from a recipe or a preset. A config made by hand gives num_layers, hidden_size,
    ffn_hidden_size, num_attention_heads and vocab_size; what all MiniCPM models share (RMSNorm, SwiGLU, no biases, no
    dropout, the constants of muP) is the default. Constructing one on a machine without CUDA lays the patches that let
    Megatron-Core run there (`parallel.device.patch_megatron`).

    Args:
        vocab_size: rows of the embedding before padding.
        max_position_embeddings: longest sequence in tokens.
        rotary_base: base of the rotary positions.
        rope_scaling: how the base grows with the context.
        untie_embeddings_and_output_weights: whether the LM head has weights of its own.
        scale_emb: factor on the embedding's output.
        scale_depth: each block's output is multiplied by scale_depth / sqrt(num_layers).
        dim_model_base: width relative to which muP counts.
        parametrization: "mup" or "standard".
        embedding_role: whether muP takes the embedding for a "vector" or a "matrix".
        fused_loss: compute the loss with the LM head, without logits (`fused_loss.VocabParallelLinearCrossEntropy`);
            False: from whole logits, which is the reference.
        attention_kernel: name in `ATTENTION_KERNELS` of what attends on one rank.
        z_loss_coeff: factor of the squared log-sum-exp of the logits, added to the losses of a model in training mode.
        make_vocab_size_divisible_by: rows of the embedding a rank holds are padded to a multiple of this (Megatron-LM's
            name and default). Padding is all zero, gets no probability and never leaves the model, so that results do
            not depend on it.

    All other fields are TransformerConfig's.

    Raises:
        UserError: Megatron-Core's own use_mup is on.
    """

    # TransformerConfig's defaults are GPT-2's: LayerNorm, GELU, biases, dropout, and CUDA extensions for fusions
    layernorm_epsilon: float = _default("norm_epsilon")
    normalization: str = "RMSNorm"
    gated_linear_unit: bool = True
    activation_func: Callable[..., Any] = F.silu
    add_bias_linear: bool = False
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    init_method_std: float = _default("init_method_std")
    use_cpu_initialization: bool = field(default_factory=device.on_cpu)
    # fusions here are CUDA extensions of apex or Transformer Engine, which the spec does not use
    bias_dropout_fusion: bool = False
    bias_activation_fusion: bool = False
    masked_softmax_fusion: bool = False
    gradient_accumulation_fusion: bool = False
    apply_rope_fusion: bool = False

    vocab_size: int = 0
    max_position_embeddings: int = _default("max_position_embeddings")
    rotary_base: float = _default("rotary_base")
    rope_scaling: RopeScaling = RopeScaling()
    untie_embeddings_and_output_weights: bool = _default("untie_embeddings_and_output_weights")
    scale_emb: float = _default("scale_emb")
    scale_depth: float = _default("scale_depth")
    dim_model_base: int = _default("dim_model_base")
    parametrization: Literal["mup", "standard"] = _default("parametrization")
    embedding_role: Literal["vector", "matrix"] = _default("embedding_role")
    fused_loss: bool = True
    attention_kernel: str = DEFAULT_ATTENTION_KERNEL
    z_loss_coeff: float = 0.0
    make_vocab_size_divisible_by: int = VOCABULARY_MULTIPLE

    def __post_init__(self) -> None:
        if self.use_mup:
            raise UserError(
                "Megatron-Core's own use_mup is on, which would scale widths twice",
                where="MiniCPMConfig.use_mup",
                fix="leave it False; MiniCPM's scaling is in scale_emb, scale_depth and dim_model_base",
            )
        device.patch_megatron()
        # Megatron-Core would draw all matrices with one deviation and divide that of block outputs by sqrt(2 layers)
        table = mup_table(self)
        for role, names in INIT_METHODS.items():
            for name in names:
                if getattr(self, name) is None:
                    setattr(self, name, _normal(table[role].init_std))
        super().__post_init__()

    def padded_vocab_size(self, tensor_model_parallel_size: int | None = None) -> int:
        """Rows of the embedding over all tensor-parallel ranks, padding included.

        Raises:
            UserError: the config has no vocabulary.
        """
        require(self.vocab_size > 0, "MiniCPMConfig.vocab_size", "is missing", "give the tokenizer's number of pieces")
        ranks = tensor_model_parallel_size or self.tensor_model_parallel_size
        unit = self.make_vocab_size_divisible_by * ranks
        return -(-self.vocab_size // unit) * unit

    @classmethod
    def from_recipe(
        cls,
        model: ModelRecipe | Recipe,
        parallel: ParallelRecipe | None = None,
        *,
        precision: Literal["fp32", "bf16"] | None = None,
        recompute: Literal["none", "selective", "full"] | None = None,
        **overrides: Any,
    ) -> MiniCPMConfig:
        """The config of a recipe, or of a model shape under a layout.

        Args:
            model: a whole recipe, whose layout, precision, recompute, fused loss and determinism are then the defaults;
                or shape and muP constants alone, for instance `minicpm_megatron.presets["minicpm-2.4b"]`.
            parallel: sizes of the model-parallel groups; default: the recipe's, or none.
            precision: dtype of parameters and activations; default: the recipe's, or fp32.
            recompute: activations computed again in backward; default: the recipe's, or none.
            overrides: any other field of the config.

        Raises:
            UserError: `model` is neither.
        """
        if isinstance(model, Recipe):
            training = model.training
            return cls.from_recipe(
                model.model,
                parallel or model.parallel,
                precision=precision or training.precision,
                recompute=recompute or training.recompute,
                **{
                    "fused_loss": training.fused_loss,
                    "attention_kernel": training.attention_kernel,
                    "z_loss_coeff": training.z_loss_coeff,
                    "deterministic_mode": training.deterministic,
                    **overrides,
                },
            )
        require(
            isinstance(model, ModelRecipe),
            "MiniCPMConfig.from_recipe",
            f"{type(model).__name__} is no recipe",
            "give load_recipe(path), or a preset: minicpm_megatron.presets[name]",
        )
        parallel = parallel or ParallelRecipe()
        dtype = PRECISIONS[precision or "fp32"]
        fields: dict[str, Any] = dict(
            num_layers=model.num_layers,
            hidden_size=model.hidden_size,
            ffn_hidden_size=model.ffn_hidden_size,
            num_attention_heads=model.num_attention_heads,
            num_query_groups=model.num_query_groups,
            kv_channels=model.kv_channels,
            layernorm_epsilon=model.norm_epsilon,
            qk_layernorm=model.qk_layernorm,
            init_method_std=model.init_method_std,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
            pipeline_dtype=dtype,
            tensor_model_parallel_size=parallel.tensor_model_parallel_size,
            pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
            context_parallel_size=parallel.context_parallel_size,
            cp_comm_type=parallel.cp_comm_type,
            expert_model_parallel_size=parallel.expert_model_parallel_size,
            sequence_parallel=parallel.sequence_parallel,
            **_recompute_fields(recompute or "none"),
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
