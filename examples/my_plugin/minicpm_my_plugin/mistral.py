"""An export format is a `Format`: names of tensors, and fields of config.json. This one is Mistral's.

Mistral has Llama's names and no multipliers, so that the multipliers go into the weights. A note in config.json keeps
them, and the export comes back unfolded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron.convert.format import Fields, Format
from minicpm_megatron.convert.formats.llama import folded, read_plain
from minicpm_megatron.convert.llama_names import DENSE_ROWS
from minicpm_megatron.recipe import ModelRecipe


def write(model: ModelRecipe) -> Fields:
    """The fields that config.json has beside those of every Llama-like model."""
    return {"head_dim": model.kv_channels, "sliding_window": None}


def read(config: Mapping[str, Any], model: ModelRecipe) -> Fields:
    """Multipliers of exactly 1, where the note does not say others."""
    return read_plain(config, model)


FORMAT = Format(
    name="mistral",
    model_type="mistral",
    architecture="MistralForCausalLM",
    rows=folded(DENSE_ROWS),
    write=write,
    read=read,
    check=lambda model: None,
    always_untied=True,
)
