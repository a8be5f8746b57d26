"""Cells: the runs that an experiment is made of, each a recipe that is known to be valid before anything starts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import BatchPlan, Recipe, build, count_parameters, recipe_hash
from minicpm_megatron.recipe import sizes as recipe_sizes
from minicpm_megatron.recipe.flops import run_flops
from minicpm_megatron.registry import SCHEDULES

if TYPE_CHECKING:
    from minicpm_megatron.training.run_data import RunData

CELLS = "cells"  # folder of the runs below the experiment's output

_SAVES = 10  # of a run whose recipe names no interval: a killed cell repeats a tenth of itself at most


@dataclass(frozen=True)
class Cell:
    """One run of the trainer.

    Attributes:
        recipe: resolved; `recipe.run_directory` is the cell's folder.
        labels: what tells it from the others, as JSON values: size, rate, seed ...
        trunk: the cell that it branches from; None: a run of its own.
        first_step: steps that the trunk has done when it branches, 0 for a run of its own.
    """

    recipe: Recipe
    labels: Mapping[str, Any]
    trunk: str | None = None
    first_step: int = 0

    @property
    def name(self) -> str:
        """Unique in its experiment; the folder's name."""
        return self.recipe.name

    @property
    def folder(self) -> Path:
        """Folder of everything that the run writes."""
        return self.recipe.run_directory

    @property
    def last_step(self) -> int:
        """Steps done when it is finished, a trunk's included."""
        return BatchPlan(self.recipe).total_steps()

    @property
    def parameters(self) -> int:
        """N of the paper: all but embedding and head."""
        return count_parameters(self.recipe.model).non_embedding

    def tokens(self, step: int | None = None) -> int:
        """Tokens of its own steps up to `step` (default: all of them)."""
        plan = BatchPlan(self.recipe)
        return plan.tokens(self.last_step if step is None else step) - plan.tokens(self.first_step)

    def flops(self, step: int | None = None) -> float:
        """FLOPs of its own steps up to `step` (default: all of them), by PaLM's convention."""
        last = self.last_step if step is None else max(step, self.first_step)
        return run_flops(self.recipe, self.first_step, last)

    @property
    def fingerprint(self) -> str:
        """sha256 of what decides its numbers: the run, what it is evaluated on, and where it branches."""
        content = [
            recipe_hash(self.recipe),
            self.recipe.data.validation,
            self.recipe.evaluation.model_dump(mode="json"),
            self.trunk,
            self.first_step,
        ]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def make_cell(
    base: Recipe,
    output: Path,
    name: str,
    overrides: Mapping[str, Any],
    labels: Mapping[str, Any],
    *,
    trunk: Cell | None = None,
    first_step: int = 0,
) -> Cell:
    """A cell below `output` whose recipe is `base` with overrides.

    Where the recipe names no interval the cell is evaluated at its end and saved a few times on the way, so that it
    can be resumed.

    Args:
        overrides: dotted key -> value; what is a section takes a mapping that replaces it whole.
        trunk, first_step: for a branch, the cell that it leaves and the step at which it does.

    Raises:
        UserError: the recipe is not valid; the line says of which cell.
    """
    fields = base.model_dump(mode="json")
    fields |= {"name": name, "preset": None}
    fields["run"]["directory"] = str(output / CELLS)
    fields["training"]["stop_after"] = None
    for dotted, value in overrides.items():
        *parents, last = dotted.split(".")
        target = fields
        for key in parents:
            target = target[key]
        target[last] = value
    try:
        recipe = build(fields)
        steps = BatchPlan(recipe).total_steps()
        fields["evaluation"]["interval"] = recipe.evaluation.interval or steps
        fields["checkpoint"]["interval"] = recipe.checkpoint.interval or -(-steps // _SAVES)
        return Cell(build(fields), dict(labels), trunk.name if trunk else None, first_step)
    except UserError as error:
        raise UserError(error.what, where=f"cell {name}: {error.where}", fix=error.fix) from error


def check_base(base: Recipe) -> None:
    """See that an experiment can be made of a recipe.

    Raises:
        UserError: its tokens are missing, damaged or of another vocabulary, or there is nothing held out to compare
            losses on.
    """
    if not base.data.validation:
        raise UserError(
            "the experiment compares losses on held-out text, and there is none",
            where="data.validation",
            fix="give name: prefix, for instance data.validation={held-out: data/valid}",
        )
    _open_data(base)


def held_out_samples(base: Recipe) -> int:
    """Samples of the smallest held-out set.

    Raises:
        UserError: as `check_base`.
    """
    check_base(base)
    return min(each.samples_per_epoch for each in _open_data(base).validation.values())


def check_loss_per_byte(base: Recipe) -> None:
    """See that evaluations of runs made of `base` will have a loss per byte.

    Raises:
        UserError: the bytes of the tokens that they read are not known; or as `check_base`.
    """
    from minicpm_megatron.training.run_data import label_bytes

    check_base(base)
    for name, dataset in _open_data(base).validation.items():
        if label_bytes(base, dataset) is None:
            ours = dataset.metadata is not None
            raise UserError(
                "the loss per byte needs the bytes of the tokens that are read, and they are not known",
                where=f"data.validation.{name}",
                fix="give data.tokenizer" if ours else "make the tokens with minicpm preprocess",
            )


def _open_data(base: Recipe) -> RunData:
    # readers of tokens and tokenizers, which `--help` and reports need not load
    from minicpm_megatron.training.run_data import open_data

    return open_data(base)


def data_fingerprints(recipe: Recipe) -> dict[str, str]:
    """Prefix -> identity of the content, of all that is read.

    Raises:
        UserError: a file is missing, or has another size than recorded.
    """
    from minicpm_megatron.data.metadata import data_fingerprint

    prefixes = [source.prefix for source in recipe.data.train] + list(recipe.data.validation.values())
    return {prefix: data_fingerprint(prefix) for prefix in prefixes}


def size_name(width: int, layers: int) -> str:
    """As the user writes it.

    >>> size_name(128, 6)
    '128x6'
    """
    return f"{width}x{layers}"


def model_of_size(base: Recipe, width: int, layers: int) -> dict[str, Any]:
    """Overrides for a model of the family of Table 8: d_ff = 2.5 d_model, d_head of `base`, a key/value head a head.

    Raises:
        UserError: the width is no multiple of d_head, or odd.
    """
    sizes = recipe_sizes.model_of_size(width, layers, base.model.kv_channels, f"size {size_name(width, layers)}")
    return {f"model.{key}": value for key, value in sizes.items()}


STANDARD_INIT_STD = 0.02
"""Initial standard deviation in standard parametrisation: GPT-2's and Megatron-LM's; the paper gives none."""


def standard_parametrization(layers: int) -> dict[str, Any]:
    """Overrides that take everything of Table 7 away: rates, initial weights, logits, embeddings and residuals."""
    return {
        "model.parametrization": "standard",
        "model.scale_emb": 1.0,
        "model.scale_depth": layers**0.5,
        "model.init_method_std": STANDARD_INIT_STD,
    }


def scaled_schedule(base: Recipe, total: int) -> dict[str, Any]:
    """`base`'s schedule stretched to another total, in its own unit: a mapping for the override "schedule"."""
    fields = base.schedule.model_dump(mode="json")
    factor = total / fields["total"]
    for key in ("warmup", "decay", "period"):
        fields[key] = _stretched(fields[key], factor)
    fields["half_life"] = fields["half_life"] and fields["half_life"] * factor
    for key in SCHEDULES.get(base.schedule.shape).options.lengths:
        fields["options"][key] = _stretched(fields["options"][key], factor)
    return fields | {"total": total}


def _stretched(length: Any, factor: float) -> Any:
    """A position or a list of them `factor` times as far, rounded to 1 at least; None and 0 are left as they are."""
    if isinstance(length, list):
        return [_stretched(each, factor) for each in length]
    return max(1, round(length * factor)) if length else length


def schedule_of_length(base: Recipe, cell: Cell, tokens_per_parameter: float) -> dict[str, Any]:
    """`base`'s schedule stretched so that `cell`, made of it, reads so many tokens a parameter (N, no embeddings).

    A mapping for the override "schedule".

    Raises:
        UserError: the batch grows, and the schedule is in steps.
    """
    plan, tokens = BatchPlan(cell.recipe), tokens_per_parameter * cell.parameters
    if plan.unit == "tokens":
        return scaled_schedule(base, round(tokens))
    if len(plan.phases) > 1:
        raise UserError("a batch that grows needs a schedule in tokens", where="--tokens-per-parameter")
    return scaled_schedule(base, max(1, round(tokens / plan.tokens(1))))


def check_names(cells: Sequence[Cell]) -> None:
    """See that every cell has a name of its own and every branch its trunk.

    Raises:
        UserError: two cells of one name.
    """
    names = [cell.name for cell in cells]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"two cells are called {twice}", where="the run plan", fix="give each value once")
    assert {cell.trunk for cell in cells} <= {None, *names}


def trunks_of(cells: Collection[Cell]) -> set[str]:
    """Names of the cells that others branch from."""
    return {cell.trunk for cell in cells if cell.trunk is not None}
