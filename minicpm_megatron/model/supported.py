"""Settings with which MiniCPM's modules would silently be another model; each is refused in one line.

Megatron-Core chooses modules for most of these settings in its own specs. A spec of another package that does not know
a setting ignores it, so this table names them all.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.multipliers import megatron_arguments


@dataclass(frozen=True)
class Rule:
    """One setting.

    Attributes:
        name: field of the config or of Megatron-LM's arguments.
        allowed: whether a value is MiniCPM's.
        fix: what to put on Megatron-LM's command line.
    """

    name: str
    allowed: Callable[[Any], bool]
    fix: str


def _is(value: Any) -> Callable[[Any], bool]:
    return lambda found: bool(found == value)


def _off(name: str, option: str = "") -> Rule:
    """A setting that must be at its neutral value: None, False, 0, an empty list."""
    return Rule(name, lambda found: not found, f"leave out {option or '--' + name.replace('_', '-')}")


CONFIG = (
    _off("use_mup"),
    Rule("normalization", _is("RMSNorm"), "--normalization RMSNorm"),
    Rule("gated_linear_unit", _is(True), "--swiglu"),
    Rule("activation_func", lambda found: found is F.silu, "--swiglu"),
    _off("activation_func_clamp_value"),
    _off("glu_linear_offset"),
    Rule("add_bias_linear", _is(False), "--disable-bias-linear"),
    _off("add_qkv_bias"),
    Rule("hidden_dropout", _is(0), "--hidden-dropout 0"),
    Rule("attention_dropout", _is(0), "--attention-dropout 0"),
    _off("layernorm_zero_centered_gamma", "--apply-layernorm-1p"),
    _off("apply_residual_connection_post_layernorm"),
    _off("fp32_residual_connection"),
    _off("fused_residual_rmsnorm"),
    _off("qk_layernorm"),
    _off("qk_l2_norm"),
    _off("qk_clip"),
    _off("log_max_attention_logit"),
    _off("attention_output_gate"),
    _off("multi_latent_attention"),
    _off("experimental_attention_variant"),
    _off("rotary_interleaved"),
    _off("no_rope_freq"),
    _off("window_size"),
    Rule("softmax_type", _is("vanilla"), "--softmax-type vanilla"),
    _off("mtp_num_layers"),
    _off("heterogeneous_block_specs", "--heterogeneous-layers-config-path"),
    _off("fp8", "--fp8-format"),
    _off("fp4", "--fp4-format"),
)
EXPERTS = (
    Rule("moe_layer_freq", lambda found: found == 1 or set(found) == {1}, "--moe-layer-freq 1"),
    _off("moe_shared_expert_intermediate_size"),
    _off("moe_latent_size"),
    _off("moe_apply_probs_on_input"),
    # the router's losses would need Megatron-Core's factor for it
    _off("calculate_per_token_loss"),
)
# decided by arguments of GPTModel and HybridModel, which no module of a spec is told
ARGUMENTS = (
    Rule("position_embedding_type", _is("rope"), "--position-embedding-type rope"),
    Rule("rotary_percent", _is(1), "--rotary-percent 1.0"),
    _off("use_rope_scaling"),
    _off("rotary_seq_len_interpolation_factor"),
)


def check_supported(config: TransformerConfig) -> None:
    """Refuse a config, or arguments of Megatron-LM's trainer, that MiniCPM's modules cannot follow.

    Raises:
        UserError: naming the first such setting and what to write instead.
    """
    # a model of MiniCPM's recipe has this norm where it asks for it; Megatron-LM's arguments do not describe it
    known = ("qk_layernorm",) if isinstance(config, MiniCPMConfig) else ()
    _check(config, tuple(rule for rule in CONFIG if rule.name not in known))
    if config.num_moe_experts is not None:
        _check(config, EXPERTS)
    arguments = megatron_arguments()
    if arguments is not None:
        _check(arguments, ARGUMENTS)


def check_plain_model(config: TransformerConfig) -> None:
    """Refuse what GPTModel and HybridModel do not give MiniCPM's layers, and MiniCPM's own models and script do.

    Dynamic rope scaling begins beyond max_position_embeddings, and up to there every model is unscaled.

    Raises:
        UserError: the rotary base is scaled at every length, or documents are to be told apart by a mask that
            Megatron-LM's data loader does not make.
    """
    arguments = megatron_arguments()
    scaling = getattr(config, "rope_scaling", None)
    kind = scaling.type if scaling else getattr(arguments, "minicpm_rope_scaling_type", "none")
    fix = "build MiniCPMModel or MiniCPMHybridModel, as examples/megatron_lm/pretrain_minicpm.py does"
    if kind not in ("none", "dynamic"):
        raise UserError(
            f"GPTModel and HybridModel know no rope scaling of type {kind}", where="MiniCPM's layer spec", fix=fix
        )
    if getattr(config, "z_loss_coeff", 0.0):
        raise UserError("GPTModel and HybridModel know no z-loss", where="MiniCPM's layer spec", fix=fix)
    if arguments is None:
        return
    if arguments.reset_attention_mask and not arguments.create_attention_mask_in_dataloader:
        raise UserError(
            "--reset-attention-mask without a mask from the data loader tells no documents apart",
            where="MiniCPM's layer spec",
            fix=f"leave out --no-create-attention-mask-in-dataloader, or {fix}",
        )
    if not getattr(arguments, "minicpm_training", True):
        warnings.warn(
            "MiniCPM's layers, but Megatron-LM's initial weights, learning rates and schedule: call "
            "minicpm_megatron.megatron_lm.use_minicpm_training(model_config) before pretrain()",
            stacklevel=2,
        )


def _check(settings: Any, rules: tuple[Rule, ...]) -> None:
    for rule in rules:
        found = getattr(settings, rule.name)
        if not rule.allowed(found):
            shown = getattr(found, "__name__", repr(found))
            raise UserError(f"{rule.name} = {shown} is not MiniCPM's", where="MiniCPM's layer spec", fix=rule.fix)
