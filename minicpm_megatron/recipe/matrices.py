"""Which weights are matrices, and which matrices each of them fuses, by a recipe alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from minicpm_megatron.recipe.schema import ModelRecipe


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model, as Megatron-Core keeps it.

    Attributes:
        rows: of each matrix in it: query, key and value; gate and up.
        columns: of all of them.
    """

    rows: tuple[int, ...]
    columns: int

    @property
    def elements(self) -> int:
        """Elements of the whole weight."""
        return sum(self.rows) * self.columns


def weights_of_roles(model: ModelRecipe, layers: int, roles: Collection[str]) -> list[Weight]:
    """Every weight with a muP role of `roles`, "hidden" or "expert", in so many layers; of all experts."""
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    attention = [Weight((queries, keys, keys), model.hidden_size), Weight((model.hidden_size,), queries)]
    mlp = [Weight((model.mlp_width, model.mlp_width), model.hidden_size), Weight((model.hidden_size,), model.mlp_width)]
    layer = attention * ("hidden" in roles)
    if model.num_moe_experts is None:
        layer += mlp * ("hidden" in roles)
    elif "expert" in roles:
        layer += mlp * model.num_moe_experts
    return layer * layers
