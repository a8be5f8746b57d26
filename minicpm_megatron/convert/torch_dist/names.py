"""Names of tensors in Megatron-Core's torch_dist checkpoints, for each tensor of ours.

Megatron-Core saves the layers of a homogeneous model stacked, with the layer as the first dimension and no number in
the name; with `non_homogeneous_layers` each layer has tensors of its own. Experts are stacked behind the layer, or in
their layer. With `singleton_local_shards` nothing is stacked, and gate and up are two tensors, `_w` and `_v`. The
layouts inside a tensor (query, key and value by groups; gate before up) are those of our checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator

from minicpm_megatron.convert.torch_dist.chunks import Region
from minicpm_megatron.recipe import ModelRecipe

LAYERS = "decoder.layers."
EXPERTS = "mlp.experts.experts."
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
# names in Megatron-Core's stock layers of norms that Transformer Engine fuses with the linear layer behind them
_FUSED_NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}
_GATE_UP = "linear_fc1.weight"


def stacked(name: str, model: ModelRecipe) -> Region:
    """The region of our tensor `name` in a checkpoint with stacked layers, which is what Megatron-LM saves."""
    return next(_regions(name, model))[0]


def find(name: str, keys: Collection[str], model: ModelRecipe) -> tuple[Region, ...]:
    """The regions that make up our tensor `name`, along its first dimension, among the tensors of a checkpoint.

    Args:
        name: of a tensor of `model`.
        keys: names of the checkpoint's tensors.

    Returns:
        One region, or gate and up; none where the checkpoint does not have the tensor.
    """
    ways = (regions for regions in _regions(name, model) if all(region.key in keys for region in regions))
    return next(ways, ())


def _regions(name: str, model: ModelRecipe) -> Iterator[tuple[Region, ...]]:
    """Every way in which Megatron-Core saves our tensor `name`, the usual one first."""
    inside = _LAYER.fullmatch(name)
    if inside is None:
        yield (Region(name),)
        return
    layer, rest, layers = int(inside[1]), inside[2], model.num_layers
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        for spelling in _spellings(rest):
            yield (Region(LAYERS + spelling, (layer,), (layers,)),)
            yield (Region(f"{LAYERS}{layer}.{spelling}"),)
        alone = f"{LAYERS}{layer}.{rest}"
    else:
        number, tail, experts = int(expert[1]), expert[2], model.num_moe_experts or 0
        yield (Region(f"{LAYERS}{EXPERTS}{tail}", (layer, number), (layers, experts)),)
        yield (Region(f"{LAYERS}{layer}.{EXPERTS}{tail}", (number,), (experts,)),)
        alone = f"{LAYERS}{layer}.{EXPERTS}{number}.{tail}"
        yield (Region(alone),)
    if alone.endswith(_GATE_UP):
        yield Region(f"{alone}_w"), Region(f"{alone}_v")


def _spellings(rest: str) -> list[str]:
    return [rest, _FUSED_NORMS[rest]] if rest in _FUSED_NORMS else [rest]
