"""Upcycling: a run whose first checkpoint is the mixture made of a dense model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.convert import open_source
from minicpm_megatron.convert.rewriting import Rewrite
from minicpm_megatron.derive.derived_run import DerivedRun, check_new_run, derived_recipe, write_run
from minicpm_megatron.derive.moments import EXPERT_MOMENTS
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.upcycling import (
    NEW_ROLES,
    Upcycling,
    upcycle_moment,
    upcycle_tensor,
    upcycled_model,
)
from minicpm_megatron.recipe import ModelRecipe, Recipe
from minicpm_megatron.registry import OPTIMIZERS
from minicpm_megatron.training.start import changed_key

# of the mixture; what else a model has is the dense one's or follows from the options
_FREE = (
    "moe_aux_loss_coeff",
    "moe_router_load_balancing_type",
    "moe_router_pre_softmax",
    "moe_z_loss_coeff",
)


def upcycle(
    dense: Path,
    run: Path,
    plan: Upcycling,
    *,
    moments: str = "clone",
    overrides: Sequence[str] = (),
    progress: bool = False,
) -> DerivedRun:
    """Make `run` out of the dense model in `dense`, whole or not at all.

    Args:
        dense: a checkpoint of ours, of any layout, or a published folder.
        moments: what experts get of Adam's: "clone" the dense MLP's, "drop" zeros; see `upcycle_moment`.
        overrides: section.key=value for the new run's recipe.
        progress: show bytes, rate and remaining time on standard error.

    Raises:
        UserError: anything wrong with the input, the options or the place.
    """
    if moments not in EXPERT_MOMENTS:
        raise UserError(f"unknown choice {moments!r}", where="--moments", fix=f"use one of {', '.join(EXPERT_MOMENTS)}")
    source = open_source(dense)
    if source.model.num_moe_experts is not None:
        raise UserError(
            f"a mixture of {source.model.num_moe_experts} experts already", where=str(dense), fix="give a dense model"
        )
    model = upcycled_model(source.model, plan)
    check_new_run(run)
    recipe = derived_recipe(source, model, run, overrides)
    if recipe:
        _check_shape(model, recipe.model)
        _check_optimizer(recipe)
        model = recipe.model
    rewrite = Rewrite(
        weight=functools.partial(upcycle_tensor, plan=plan),
        moment=functools.partial(upcycle_moment, plan=plan, clone=moments == "clone"),
    )
    how = {"upcycling": {**plan.facts(), "moments": moments}}
    return write_run(source, run, model, recipe, rewrite, how=how, new_roles=NEW_ROLES, progress=progress)


def _check_optimizer(recipe: Recipe) -> None:
    """Refuse an optimizer that keeps other moments of routers than of the MLPs that they are made from."""
    spec = OPTIMIZERS.get(recipe.optimizer.name)
    if not spec.moments_for("hidden") == spec.moments_for("expert") == spec.moments_for("router"):
        raise UserError(
            f"{recipe.optimizer.name} keeps other moments of routers than of dense MLPs",
            where="optimizer.name",
            fix="export the weights, and upcycle the exported folder",
        )


def _check_shape(upcycled: ModelRecipe, overridden: ModelRecipe) -> None:
    key = changed_key(upcycled, overridden, free=_FREE)
    if key is not None:
        raise UserError(
            f"upcycling makes it {getattr(upcycled, key)!r}, not {getattr(overridden, key)!r}",
            where=f"override model.{key}",
            fix="use --experts, --top-k and --granularity",
        )
