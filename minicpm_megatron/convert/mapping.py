"""Name tables: one row a kind of tensor, with wildcards, and their expansion for one model.

A format is a table and a few lines on its configuration; nothing here or elsewhere branches on a format's name.
The first `*` of a pattern counts layers, the second experts. Where the canonical pattern has a wildcard that the
published ones lack, one published tensor holds all its values stacked, and the row's fusion gets them in order.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minicpm_megatron.convert.fused import COPY, Fusion, Shape
from minicpm_megatron.recipe import ModelRecipe


@dataclass(frozen=True)
class Kind:
    """A kind of tensor of our checkpoints: Megatron-Core's name with wildcards, and its un-sharded shape."""

    pattern: str
    shape: Callable[[ModelRecipe], Shape]


def _qkv_rows(model: ModelRecipe) -> int:
    return (model.num_attention_heads + 2 * model.num_query_groups) * model.kv_channels


def _vector(model: ModelRecipe) -> Shape:
    return (model.hidden_size,)


_LAYER = "decoder.layers.*."
EMBEDDING = Kind("embedding.word_embeddings.weight", lambda m: (m.vocab_size, m.hidden_size))
INPUT_NORM = Kind(_LAYER + "input_layernorm.weight", _vector)
QKV_WEIGHT = Kind(_LAYER + "self_attention.linear_qkv.weight", lambda m: (_qkv_rows(m), m.hidden_size))
ATTENTION_OUTPUT = Kind(
    _LAYER + "self_attention.linear_proj.weight", lambda m: (m.hidden_size, m.num_attention_heads * m.kv_channels)
)
MLP_NORM = Kind(_LAYER + "pre_mlp_layernorm.weight", _vector)
MLP_INPUT = Kind(_LAYER + "mlp.linear_fc1.weight", lambda m: (2 * m.ffn_hidden_size, m.hidden_size))
MLP_OUTPUT = Kind(_LAYER + "mlp.linear_fc2.weight", lambda m: (m.hidden_size, m.ffn_hidden_size))
ROUTER = Kind(_LAYER + "mlp.router.weight", lambda m: (m.num_moe_experts or 0, m.hidden_size))
EXPERT_INPUT = Kind(
    _LAYER + "mlp.experts.local_experts.*.linear_fc1.weight", lambda m: (2 * m.mlp_width, m.hidden_size)
)
EXPERT_OUTPUT = Kind(_LAYER + "mlp.experts.local_experts.*.linear_fc2.weight", lambda m: (m.hidden_size, m.mlp_width))
FINAL_NORM = Kind("decoder.final_layernorm.weight", _vector)
HEAD = Kind("output_layer.weight", lambda m: (m.vocab_size, m.hidden_size))


@dataclass(frozen=True)
class Row:
    """One kind of tensor in a format.

    Attributes:
        kind: the canonical side.
        published: the format's names, in the order of the fusion's parts.
        fusion: how the two sides correspond.
        fold: multiplier that the format holds inside this weight: published = fold x canonical.
    """

    kind: Kind
    published: tuple[str, ...]
    fusion: Fusion = COPY
    fold: Callable[[ModelRecipe], float] | None = None


@dataclass(frozen=True)
class Group:
    """One row at one layer: these canonical tensors are those published ones."""

    row: Row
    canonical: tuple[str, ...]
    published: tuple[str, ...]

    def published_shapes(self, model: ModelRecipe) -> dict[str, Shape]:
        """Name -> shape of the published side."""
        return dict(zip(self.published, self.row.fusion.shapes(self.row.kind.shape(model), model), strict=True))

    def to_published(self, tensors: Sequence[torch.Tensor], model: ModelRecipe) -> dict[str, torch.Tensor]:
        """Canonical tensors, in the order of `canonical`, to the format's."""
        factor = self.row.fold(model) if self.row.fold else 1.0
        parts = self.row.fusion.split(tensors, model)
        scaled = (part if factor == 1.0 else part * factor for part in parts)
        return dict(zip(self.published, scaled, strict=True))

    def to_canonical(self, tensors: Sequence[torch.Tensor], model: ModelRecipe) -> dict[str, torch.Tensor]:
        """The format's tensors, in the order of `published`, to canonical ones."""
        factor = self.row.fold(model) if self.row.fold else 1.0
        merged = self.row.fusion.merge(tensors, model)
        scaled = (part if factor == 1.0 else part / factor for part in merged)
        return dict(zip(self.canonical, scaled, strict=True))


def _fill(pattern: str, values: Sequence[int]) -> str:
    for value in values:
        pattern = pattern.replace("*", str(value), 1)
    return pattern


def expand(rows: Sequence[Row], model: ModelRecipe) -> list[Group]:
    """The groups of one model, in reading order: what is before the layers, layer by layer, what is after them."""
    before: list[tuple[tuple[int, ...], Group]] = []
    layers: list[tuple[tuple[int, ...], Group]] = []
    after: list[tuple[tuple[int, ...], Group]] = []
    experts = model.num_moe_experts or 0
    for row in rows:
        depth = row.published[0].count("*")
        target = layers if depth else after if layers else before
        for values in itertools.product(*map(range, (model.num_layers, experts)[:depth])):
            inner = _fill(row.kind.pattern, values)
            rest = range(experts) if "*" in inner else (0,)
            canonical = tuple(_fill(inner, (value,)) for value in rest)
            target.append((values, Group(row, canonical, tuple(_fill(name, values) for name in row.published))))
    layers.sort(key=lambda entry: entry[0][0])  # stable: rows keep their order within a layer
    return [group for _, group in itertools.chain(before, layers, after)]
