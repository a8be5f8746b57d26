"""The three multipliers of a MiniCPM forward pass, and what keeps them across formats that cannot hold them.

A format either has fields for them (minicpm, granite, granitemoe) or folds them into the weights (llama, mixtral).
What it has no field for travels as a *note*: one object in config.json under `NOTE_KEY`, which other programs keep and
ignore.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods import mup
from minicpm_megatron.recipe import ModelRecipe

NOTE_KEY = "minicpm_megatron"
NOTE_FIELDS = (
    "scale_emb",
    "scale_depth",
    "dim_model_base",
    "init_method_std",
    "parametrization",
    "embedding_role",
    "untie_embeddings_and_output_weights",
)
# of a mixture of experts; intermediate_size is the width of its experts
EXPERT_NOTE_FIELDS = (
    "ffn_hidden_size",
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_z_loss_coeff",
)
# where the base of RoPE is scaled once and for all (`rope.rope_note`)
SCALING_FIELDS = ("rotary_base", "rope_scaling")
# a multiplier that went through decimal text and a square root comes back to within a few units in the last place
AGREEMENT = 1e-9


def embedding_multiplier(model: ModelRecipe) -> float:
    """Factor on the embedding output: scale_emb (arXiv 2404.06395, Table 7)."""
    return model.scale_emb


def residual_multiplier(model: ModelRecipe) -> float:
    """Factor on each block's output before it is added (Table 7)."""
    return mup.residual_multiplier(model.scale_depth, model.num_layers)


def logits_multiplier(model: ModelRecipe) -> float:
    """Factor on the logits: the inverse of the width multiplier (Table 7), 1 under standard parametrization."""
    return 1.0 / mup.width_multiplier(model)


MULTIPLIERS = (embedding_multiplier, residual_multiplier, logits_multiplier)


def same_multipliers(first: ModelRecipe, second: ModelRecipe) -> bool:
    """Whether both compute the same function of the same weights."""
    return all(math.isclose(f(first), f(second), rel_tol=AGREEMENT) for f in MULTIPLIERS)


def write_note(model: ModelRecipe) -> dict[str, Any]:
    """What a published configuration cannot say about `model`."""
    return {field: getattr(model, field) for field in _fields(sparse=model.num_moe_experts is not None)}


def read_note(config: Mapping[str, Any], *, sparse: bool = False, where: str = "config.json") -> dict[str, Any]:
    """The note in a config.json, restricted to the fields of the kind of model; empty when there is none.

    Raises:
        UserError: it has a field that no release up to this one has written: it may change the model.
    """
    note = config.get(NOTE_KEY)
    if not isinstance(note, dict):
        return {}
    known = {*NOTE_FIELDS, *EXPERT_NOTE_FIELDS, *SCALING_FIELDS}
    if unknown := sorted(set(note) - known):
        raise UserError(f"unknown key {unknown[0]}", where=f"{where}: {NOTE_KEY}", fix="a later release wrote it")
    return {field: note[field] for field in _fields(sparse) if field in note}


def _fields(sparse: bool) -> tuple[str, ...]:
    return NOTE_FIELDS + EXPERT_NOTE_FIELDS if sparse else NOTE_FIELDS
