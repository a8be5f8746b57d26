"""Fused weights of Megatron-Core taken apart and put together, as pure functions of tensors.

Megatron-Core keeps query, key and value of a layer in one matrix and gate and up in another; every published
format keeps them apart. A `Fusion` is the pair of directions with the shapes that each side must have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from minicpm_megatron.recipe import ModelRecipe

Shape = tuple[int, ...]
Tensors = tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Fusion:
    """How a group of canonical tensors corresponds to a group of published ones.

    Attributes:
        shapes: canonical shape -> shape of each published tensor.
        split: canonical tensors -> published tensors (views where possible).
        merge: published tensors -> canonical tensors; the exact inverse of `split`.
    """

    shapes: Callable[[Shape, ModelRecipe], tuple[Shape, ...]]
    split: Callable[[Sequence[torch.Tensor], ModelRecipe], Tensors]
    merge: Callable[[Sequence[torch.Tensor], ModelRecipe], Tensors]


def split_qkv(qkv: torch.Tensor, heads: int, groups: int, channels: int) -> Tensors:
    """Megatron-Core's grouped rows to separate query, key and value matrices.

    Args:
        qkv: [(heads + 2 groups) channels, hidden]; for each key/value group its heads/groups query heads, then its
            key, then its value.
    Returns:
        query [heads channels, hidden], key and value [groups channels, hidden].
    """
    per_group = heads // groups
    grouped = qkv.reshape(groups, per_group + 2, channels, qkv.shape[-1])
    query, key, value = grouped.split((per_group, 1, 1), dim=1)
    return tuple(part.reshape(-1, qkv.shape[-1]) for part in (query, key, value))


def merge_qkv(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, groups: int, channels: int) -> torch.Tensor:
    """The inverse of `split_qkv`: [(heads + 2 groups) channels, hidden]."""
    hidden = query.shape[-1]
    parts = [part.reshape(groups, -1, channels, hidden) for part in (query, key, value)]
    return torch.cat(parts, dim=1).reshape(-1, hidden)


def _qkv_shapes(shape: Shape, model: ModelRecipe) -> tuple[Shape, ...]:
    query, key = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    return (query, *shape[1:]), (key, *shape[1:]), (key, *shape[1:])


COPY = Fusion(
    shapes=lambda shape, model: (shape,),
    split=lambda tensors, model: tuple(tensors),
    merge=lambda tensors, model: tuple(tensors),
)
QKV = Fusion(
    shapes=_qkv_shapes,
    split=lambda tensors, model: split_qkv(
        tensors[0], model.num_attention_heads, model.num_query_groups, model.kv_channels
    ),
    merge=lambda qkv, model: (merge_qkv(qkv[0], qkv[1], qkv[2], model.num_query_groups, model.kv_channels),),
)
# gate first: Megatron-Core's SwiGLU applies silu to the first half
GATE_UP = Fusion(
    shapes=lambda shape, model: ((shape[0] // 2, *shape[1:]),) * 2,
    split=lambda tensors, model: tensors[0].chunk(2, dim=0),
    merge=lambda tensors, model: (torch.cat(list(tensors), dim=0),),
)
# a layer's experts, one tensor each, in one tensor with a leading dimension
STACK = Fusion(
    shapes=lambda shape, model: ((model.num_moe_experts or 0, *shape),),
    split=lambda tensors, model: (torch.stack(list(tensors)),),
    merge=lambda tensors, model: tensors[0].unbind(0),
)
