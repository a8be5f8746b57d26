"""Rotary positions in a config.json: the base and how it is scaled, as every program reads them.

A dynamic scaling has a field of its own everywhere. `ntk` and `product` are another base and nothing else, so they are
written as that base, which no program can misread; the note keeps what it was made of.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron.convert.config_fields import number
from minicpm_megatron.convert.multipliers import NOTE_KEY, SCALING_FIELDS
from minicpm_megatron.errors import UserError, shorten
from minicpm_megatron.methods.rope import rope_of
from minicpm_megatron.recipe import ModelRecipe, build_section

Fields = dict[str, Any]
_UNDERSTOOD = {"default": set(), "dynamic": {"factor", "original_max_position_embeddings"}}
_SHOWN = 100  # longrope has two lists of a factor a channel
_EVERYWHERE = {"type", "rope_type", "rope_theta", "partial_rotary_factor"}


def write_rope(model: ModelRecipe) -> Fields:
    """The fields of config.json.

    transformers 5 reads rope_parameters, everything older the two top-level keys; a reader that finds neither of its
    own falls back to a base of its own choosing without a word. Of rope_scaling, older ones refuse more than the two
    members that are written.
    """
    base = rope_of(model).base_at(1)
    if model.rope_scaling.type != "dynamic":
        return {
            "rope_parameters": {"rope_type": "default", "rope_theta": base},
            "rope_theta": base,
            "rope_scaling": None,
        }
    factor = model.rope_scaling.factor
    return {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": base, "factor": factor},
        "rope_theta": base,
        "rope_scaling": {"type": "dynamic", "factor": factor},
    }


def fixed_rope(model: ModelRecipe, length: int) -> ModelRecipe:
    """`model` with the one base that dynamic scaling gives sequences of `length` tokens, and a context so long.

    On a sequence of exactly `length` tokens it is the same model, on a shorter one another: the base no longer follows
    the length.

    Raises:
        UserError: the model's base does not depend on the length, or the length is outside of its context.
    """
    where = "--rope-fixed"
    if model.rope_scaling.type != "dynamic":
        raise UserError("the model's RoPE has one base already", where=where, fix="leave it out")
    if not model.max_position_embeddings <= length <= model.longest_sequence:
        raise UserError(
            f"{length} tokens are outside of the {model.max_position_embeddings} to {model.longest_sequence} that"
            " dynamic RoPE scales over",
            where=where,
        )
    changes = {"rotary_base": rope_of(model).base_at(length), "rope_scaling": None, "max_position_embeddings": length}
    return build_section(ModelRecipe, model.model_dump() | changes, where=where)


def dynamic_note(model: ModelRecipe) -> str | None:
    """Return a note for an export whose RoPE base grows with the length; None for every other export."""
    if model.rope_scaling.type != "dynamic":
        return None
    return (
        f"dynamic RoPE: CTranslate2 refuses it, and llama.cpp stops at {model.max_position_embeddings} tokens;"
        f" --rope-fixed LENGTH, up to {model.longest_sequence}, writes the one base of that length"
    )


def rope_note(model: ModelRecipe) -> Fields:
    """What `write_rope` cannot say: what the base was before it was scaled."""
    if model.rope_scaling.type in ("none", "dynamic"):
        return {}
    return {field: model.model_dump(mode="json")[field] for field in SCALING_FIELDS}


def read_rope(config: Mapping[str, Any], longest: Any) -> Fields:
    """rotary_base and rope_scaling of a `ModelRecipe`, from whichever of the keys are there.

    Args:
        longest: max_position_embeddings of the same config.json, where transformers begins to scale.

    Raises:
        UserError: a scaling that is not understood, or two places that say different things.
    """
    places = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    scalings = [_scaling(key, value, longest) for key, value in places.items()]
    if any(scaling != scalings[0] for scaling in scalings[1:]):
        said = " and ".join(f"{key} {shorten(value, _SHOWN)}" for key, value in places.items())
        raise UserError(f"{said} differ")
    bases = {number(place, "rope_theta") for place in (*places.values(), config) if "rope_theta" in place}
    if len(bases) > 1:
        raise UserError(f"two different values of rope_theta: {sorted(bases)}")
    return {
        "rotary_base": bases.pop() if bases else ModelRecipe.model_fields["rotary_base"].default,
        "rope_scaling": scalings[0] if scalings else None,
    }


def with_noted_scaling(native: ModelRecipe, config: Mapping[str, Any]) -> ModelRecipe:
    """`native` with the scaling that the note remembers, if that makes the base which config.json states."""
    note = config.get(NOTE_KEY)
    if not isinstance(note, dict) or not all(field in note for field in SCALING_FIELDS):
        return native
    fields = native.model_dump() | {field: note[field] for field in SCALING_FIELDS}
    try:
        noted = build_section(ModelRecipe, fields, where=NOTE_KEY)
    except UserError:  # edited by hand since: the configuration's own fields are right
        return native
    return noted if rope_of(noted).base_at(1) == rope_of(native).base_at(1) else native


def _scaling(key: str, value: Any, longest: Any) -> Fields | None:
    """One of the two objects as `rope_scaling`."""
    kind = value.get("rope_type", value.get("type", "default")) if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _UNDERSTOOD or value.get("partial_rotary_factor", 1.0) != 1.0:
        raise UserError(
            f"{key} {shorten(value, _SHOWN)} is not supported", fix="unscaled and dynamic RoPE can be imported"
        )
    if kind == "default":
        return None
    if unknown := sorted(set(value) - _UNDERSTOOD[kind] - _EVERYWHERE):
        raise UserError(
            f"{key} {shorten(value, _SHOWN)} is not supported: {unknown[0]}",
            fix="dynamic RoPE takes a factor and no more",
        )
    if value.get("original_max_position_embeddings", longest) != longest:
        raise UserError(
            f"{key} begins at {value['original_max_position_embeddings']!r} and max_position_embeddings is {longest!r},"
            " where transformers begins",
            fix="set max_position_embeddings to the first",
        )
    return {"type": "dynamic", "factor": number(value, "factor")}
