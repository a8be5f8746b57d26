"""Llama: the multipliers folded into the weights, so that any Llama runtime runs a MiniCPM.

embedding x scale_emb, attention and MLP output x scale_depth / sqrt(layers), head x dim_model_base / hidden_size.
Embedding and head get different factors, so the two are always separate tensors. Folding rounds once, in fp32.

Coming back, the note in config.json tells how to unfold; a Llama of somebody else's gets multipliers that are
exactly 1 and keeps its weights.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from minicpm_megatron.convert import mapping
from minicpm_megatron.convert.format import Fields, Format
from minicpm_megatron.convert.llama_names import DENSE_ROWS
from minicpm_megatron.convert.mapping import Row
from minicpm_megatron.convert.multipliers import embedding_multiplier, logits_multiplier, residual_multiplier
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe

_FOLDS = {
    mapping.EMBEDDING: embedding_multiplier,
    mapping.ATTENTION_OUTPUT: residual_multiplier,
    mapping.MLP_OUTPUT: residual_multiplier,
    mapping.EXPERT_OUTPUT: residual_multiplier,
    mapping.HEAD: logits_multiplier,
}


def folded(rows: Sequence[Row]) -> tuple[Row, ...]:
    """The table with the multipliers inside the weights."""
    return tuple(dataclasses.replace(row, fold=_FOLDS.get(row.kind)) for row in rows)


def _write(model: ModelRecipe) -> Fields:
    return {"head_dim": model.kv_channels, "mlp_bias": False, "pretraining_tp": 1}


def read_plain(config: Mapping[str, Any], model: ModelRecipe) -> Fields:
    """Multipliers of exactly 1: what is folded is in the weights."""
    return {"scale_emb": 1.0, "scale_depth": math.sqrt(model.num_layers), "dim_model_base": model.hidden_size}


def _check(model: ModelRecipe) -> None:
    if model.hidden_size % model.num_attention_heads:
        raise UserError(
            f"hidden_size {model.hidden_size} is not a multiple of {model.num_attention_heads} heads, which "
            "transformers' Llama asks for",
            where="--to llama",
            fix="--to granite takes it",
        )


FORMAT = Format(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    rows=folded(DENSE_ROWS),
    write=_write,
    read=read_plain,
    check=_check,
    always_untied=True,
)
