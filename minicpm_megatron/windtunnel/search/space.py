"""What is searched: the four values that the paper found by a Bayesian search (section 3.1, appendix A.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from minicpm_megatron.recipe import ModelRecipe, OptimizerRecipe

REACH = 8.0
"""Default ranges go from the paper's value over this to the paper's value times this: ours, it gives none."""

Range = tuple[float, float]
Values = Mapping[str, float]
"""Name of an axis -> value."""


@dataclass(frozen=True)
class Axis:
    """One of the values.

    Attributes:
        name: as the paper calls it.
        key: of the recipe.
        paper: the paper's best, which is the recipe's default.
    """

    name: str
    key: str
    paper: float

    @property
    def option(self) -> str:
        """Of the command, that gives its range."""
        return f"--{self.name.replace('_', '-')}"

    def default_range(self) -> Range:
        """(low, high), the paper's value in the middle of their logarithms."""
        return self.paper / REACH, self.paper * REACH


def _model(name: str, field: str) -> Axis:
    return Axis(name, f"model.{field}", float(ModelRecipe.model_fields[field].default))


AXES = (
    _model("scale_depth", "scale_depth"),
    _model("scale_emb", "scale_emb"),
    _model("init_std", "init_method_std"),
    Axis("rate", "optimizer.lr", OptimizerRecipe().lr),
)
PAPER: Values = {axis.name: axis.paper for axis in AXES}


def position(value: float, within: Range) -> float:
    """Where a value lies on the logarithm of its range, from -1 to 1."""
    low, high = within
    return 2 * math.log(value / low) / math.log(high / low) - 1
