"""A recipe as text, and as the fingerprint of what decides a run's numbers."""

from __future__ import annotations

import hashlib
import json

import yaml

from minicpm_megatron.recipe.schema import Recipe
from minicpm_megatron.recipe.yaml_text import CoreDumper

# what a run's folder calls the recipe that it was started with
RECIPE = "recipe.yaml"

# Left out: where things go, what is logged or evaluated, how ranks are laid out, when to stop. One run has the same
# losses under any of them, so they may differ between a checkpoint and the run that resumes it.
DEFINING: dict[str, tuple[str, ...] | None] = {
    "model": None,
    "data": ("train", "sequence_length", "reset_attention_mask", "curriculum"),
    "training": (
        "global_batch_size",
        "batch_growth",
        "precision",
        "gradient_clipping",
        "seed",
        "z_loss_coeff",
        "objective",
    ),
    "optimizer": None,
    "schedule": None,
    "faults": None,
}


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out; `load_recipe` reads it back equal."""
    fields = recipe.model_dump(mode="json")
    return yaml.dump(fields, Dumper=CoreDumper, sort_keys=False, allow_unicode=True, width=110)


def recipe_hash(recipe: Recipe) -> str:
    """sha256 (hex) over the canonical JSON of the fields in `DEFINING`: equal hashes, equal runs given equal data."""
    fields = recipe.model_dump(mode="json")
    defining = {
        section: fields[section] if keys is None else {key: fields[section][key] for key in keys}
        for section, keys in DEFINING.items()
    }
    # keys younger than the hash: without them, where they have their default, the hashes of earlier runs hold
    for section, key in (
        ("training", "z_loss_coeff"),
        ("training", "objective"),
        ("model", "qk_layernorm"),
        ("optimizer", "name"),
        ("optimizer", "options"),
        ("schedule", "options"),
    ):
        if defining[section][key] == type(getattr(recipe, section)).model_fields[key].get_default(
            call_default_factory=True
        ):
            del defining[section][key]
    return hashlib.sha256(json.dumps(defining, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
