"""Untying: a run whose first checkpoint has a head of its own."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.convert import open_source
from minicpm_megatron.convert.rewriting import has_moments
from minicpm_megatron.convert.untying import NEW_ROLES, check_tied, untie_rewrite, untied_model
from minicpm_megatron.derive.derived_run import DerivedRun, check_new_run, derived_recipe, write_run
from minicpm_megatron.derive.moments import HEAD_MOMENTS
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe


def untie(
    tied: Path,
    run: Path,
    *,
    head_moments: str | None = None,
    model: ModelRecipe | None = None,
    progress: bool = False,
) -> DerivedRun:
    """Make `run` out of the tied model in `tied`, whole or not at all.

    Args:
        tied: a checkpoint of ours, of any layout, or any other folder that `open_source` takes.
        head_moments: what the head gets of Adam's: "copy" (default) the embedding's, "zero" zeros; see `untie_rewrite`.
        model: the model of a torch_dist checkpoint, see `open_source`.
        progress: show bytes, rate and remaining time on standard error.

    Raises:
        UserError: anything wrong with the input, the options or the place.
    """
    if head_moments not in (None, *HEAD_MOMENTS):
        raise UserError(
            f"unknown choice {head_moments!r}", where="--head-moments", fix=f"use one of {', '.join(HEAD_MOMENTS)}"
        )
    source = open_source(tied, model)
    check_tied(source)
    check_new_run(run)
    moments: str | None = None
    if has_moments(source):
        moments = head_moments or HEAD_MOMENTS[0]
    elif head_moments is not None:
        raise UserError(f"{tied} has no optimizer state", where="--head-moments", fix="leave it out")
    untied = untied_model(source.model)
    return write_run(
        source,
        run,
        untied,
        derived_recipe(source, untied, run),
        untie_rewrite(copy_moments=moments == "copy"),
        how={"untying": {"head_moments": moments}},
        new_roles=NEW_ROLES,
        progress=progress,
    )
