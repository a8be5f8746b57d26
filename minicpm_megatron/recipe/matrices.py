"""Weights that are matrices, and the matrices that Megatron-Core fuses in each, from a recipe alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from minicpm_megatron.recipe.schema import ModelRecipe


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model, as Megatron-Core keeps it.

    Attributes:
        rows: one number for each fused matrix: query, key and value; gate and up.
        columns: the same number for every fused matrix.
    """

    rows: tuple[int, ...]
    columns: int

    @property
    def elements(self) -> int:
        """Elements of the whole weight."""
        return sum(self.rows) * self.columns

    @property
    def cost(self) -> int:
        """As `update_cost`."""
        return update_cost(sum(self.rows), self.columns)


def update_cost(rows: int, columns: int) -> int:
    """Return what the update of a whole weight costs, up to a factor: the products of its smaller Gram matrix.

    `engine.whole_matrices` deals weights out by it, and `planning.communication` predicts how.
    """
    return rows * columns * min(rows, columns)


def weights_of_roles(model: ModelRecipe, layers: int, roles: Collection[str]) -> list[Weight]:
    """Return every weight of `layers` layers whose muP role, "hidden" or "expert", is in `roles`, of all experts."""
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    attention = [Weight((queries, keys, keys), model.hidden_size), Weight((model.hidden_size,), queries)]
    mlp = [Weight((model.mlp_width, model.mlp_width), model.hidden_size), Weight((model.hidden_size,), model.mlp_width)]
    layer = attention * ("hidden" in roles)
    if model.num_moe_experts is None:
        layer += mlp * ("hidden" in roles)
    elif "expert" in roles:
        layer += mlp * model.num_moe_experts
    return layer * layers
