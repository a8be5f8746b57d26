"""Rules of model.rope_scaling: what it says must be used, and must fit the context."""

from __future__ import annotations

from typing import TYPE_CHECKING

from minicpm_megatron.recipe.checks import refuse_unless

if TYPE_CHECKING:
    from minicpm_megatron.recipe.schema import ModelRecipe


def check_rope_scaling(model: ModelRecipe) -> None:
    """Refuse a scaling that contradicts itself or the context.

    Raises:
        UserError: naming the dotted field at fault and what to do.
    """
    scaling, longest = model.rope_scaling, model.max_position_embeddings
    if scaling.type == "none":
        for field in ("factor", "original_max_position_embeddings"):
            value = getattr(scaling, field)
            refuse_unless(
                value is None,
                f"model.rope_scaling.{field}",
                f"{value} is given, and model.rope_scaling.type none has no use for it",
                f"set model.rope_scaling.{field}=null, or choose a type",
            )
        return
    refuse_unless(
        scaling.factor is not None,
        "model.rope_scaling.factor",
        f"{scaling.type} scaling needs its factor",
        "give how many times as long the context becomes",
    )
    refuse_unless(
        model.kv_channels > 2,
        "model.kv_channels",
        f"{scaling.type} scaling divides by the channels a head less 2",
        "give at least 4, or set model.rope_scaling=null",
    )
    original = scaling.original_max_position_embeddings
    if original is None:
        return
    refuse_unless(
        scaling.type != "dynamic" or original == longest,
        "model.rope_scaling.original_max_position_embeddings",
        f"{original} is not model.max_position_embeddings {longest}, where dynamic scaling begins",
        "leave it out and set model.max_position_embeddings to it",
    )
    refuse_unless(
        longest <= original * (scaling.factor or 1),
        "model.rope_scaling.factor",
        f"model.max_position_embeddings {longest} is more than {scaling.factor:g} times {original}",
        f"give at least {longest / original:g}",
    )
