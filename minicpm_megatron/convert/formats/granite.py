"""IBM Granite: transformers' own model with exactly MiniCPM's multipliers, so weights go in unchanged.

embedding_multiplier = scale_emb, residual_multiplier = scale_depth / sqrt(layers),
logits_scaling = hidden_size / dim_model_base (a divisor), attention_multiplier = 1 / sqrt(head width).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minicpm_megatron.convert.config_fields import number
from minicpm_megatron.convert.format import Fields, Format
from minicpm_megatron.convert.llama_names import DENSE_ROWS
from minicpm_megatron.convert.multipliers import AGREEMENT, embedding_multiplier, residual_multiplier
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods import mup
from minicpm_megatron.recipe import ModelRecipe


def write(model: ModelRecipe) -> Fields:
    """The multipliers as Granite's fields, and the head width where it does not follow."""
    fields: Fields = {
        "embedding_multiplier": embedding_multiplier(model),
        "residual_multiplier": residual_multiplier(model),
        "logits_scaling": mup.width_multiplier(model),
        # the default of 1.0 would leave attention unscaled
        "attention_multiplier": model.kv_channels**-0.5,
    }
    if model.num_moe_experts is None:
        fields["mlp_bias"] = False
    if model.kv_channels * model.num_attention_heads != model.hidden_size:
        fields["head_dim"] = model.kv_channels
    return fields


def read(config: Mapping[str, Any], model: ModelRecipe) -> Fields:
    """Granite's fields as our multipliers.

    Raises:
        UserError: attention scaled otherwise, or a divisor of the logits that is no ratio of widths.
    """
    attention = number(config, "attention_multiplier", 1.0)
    if not math.isclose(attention, model.kv_channels**-0.5, rel_tol=AGREEMENT):
        raise UserError(
            f"attention_multiplier {attention} is not 1/sqrt({model.kv_channels})",
            fix="only attention scaled by the root of the head width can be imported",
        )
    scaling = number(config, "logits_scaling", 1.0)
    base = round(model.hidden_size / scaling) if scaling > 0 else 0
    if base < 1 or not math.isclose(base * scaling, model.hidden_size, rel_tol=AGREEMENT):
        raise UserError(f"logits_scaling {scaling} does not divide hidden_size {model.hidden_size}")
    return {
        "scale_emb": number(config, "embedding_multiplier", 1.0),
        "scale_depth": number(config, "residual_multiplier", 1.0) * math.sqrt(model.num_layers),
        "dim_model_base": base,
    }


FORMAT = Format(
    name="granite",
    model_type="granite",
    architecture="GraniteForCausalLM",
    rows=DENSE_ROWS,
    write=write,
    read=read,
    check=lambda model: None,
)
