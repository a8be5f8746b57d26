"""MiniCPM as openbmb publishes it: weights unchanged, the multipliers as scale_emb, scale_depth, dim_model_base.

There is no auto_map: the published modelling code does not import under transformers 5, and a folder of weights that
carries no code can run none. Programs that know MiniCPM themselves (llama.cpp, mlx-lm) read it as it is; for stock
transformers the granite format, granitemoe for a mixture of experts, has the same weights.

The head is always written as a tensor with tie_word_embeddings false, the one form that every program reads: an
absent key fails in one, true breaks another. The note keeps that it was tied.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron.convert.config_fields import number
from minicpm_megatron.convert.format import Fields, Format, refuse_uneven_heads
from minicpm_megatron.convert.llama_names import DENSE_ROWS, expert_rows
from minicpm_megatron.convert.multipliers import logits_multiplier
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe


def _write(model: ModelRecipe) -> Fields:
    whole = model.scale_emb.is_integer()
    return {
        "scale_emb": int(model.scale_emb) if whole else model.scale_emb,
        "scale_depth": model.scale_depth,
        # readers divide the hidden state by hidden_size / dim_model_base whatever the model was trained with
        "dim_model_base": round(model.hidden_size * logits_multiplier(model)),
    }


def _read(config: Mapping[str, Any], model: ModelRecipe) -> Fields:
    base = number(config, "dim_model_base")
    if not base.is_integer():
        raise UserError(f"dim_model_base must be a whole number, not {base}")
    return {
        "scale_emb": number(config, "scale_emb"),
        "scale_depth": number(config, "scale_depth"),
        "dim_model_base": int(base),
    }


FORMAT = Format(
    name="minicpm",
    model_type="minicpm",
    architecture="MiniCPMForCausalLM",
    rows=DENSE_ROWS,
    sparse_rows=expert_rows("mlp"),
    experts_key="num_experts",
    write=_write,
    read=_read,
    check=lambda model: refuse_uneven_heads(model, "minicpm"),
    tied_by_default=True,  # of the published configuration class
    always_untied=True,
)
