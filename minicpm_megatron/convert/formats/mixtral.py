"""Mixtral: the multipliers folded into the weights, so that any Mixtral runtime runs a MiniCPM mixture of experts.

As in `llama`, with the factor scale_depth / sqrt(layers) on every expert's w2: an expert's output is linear in it, and
the weights of a token's experts sum to 1 in both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron.convert.format import Fields, Format
from minicpm_megatron.convert.formats.llama import folded, read_plain
from minicpm_megatron.convert.llama_names import expert_rows
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe


def _write(model: ModelRecipe) -> Fields:
    return {"head_dim": model.kv_channels, "sliding_window": None}


def _read(config: Mapping[str, Any], model: ModelRecipe) -> Fields:
    if config.get("sliding_window") is not None:
        raise UserError(
            f"sliding_window {config['sliding_window']!r} is not supported", fix="only null can be imported"
        )
    return read_plain(config, model)


FORMAT = Format(
    name="mixtral",
    model_type="mixtral",
    architecture="MixtralForCausalLM",
    rows=(),
    sparse_rows=folded(expert_rows("block_sparse_moe")),
    experts_key="num_local_experts",
    write=_write,
    read=_read,
    check=lambda model: None,
    always_untied=True,
)
