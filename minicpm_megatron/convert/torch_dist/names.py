"""Names of tensors in Megatron-Core's torch_dist checkpoints, for each tensor of ours.

Megatron-Core saves the layers of a homogeneous model stacked, with the layer as the first dimension and no number in
the name; with `non_homogeneous_layers` each layer has tensors of its own. Experts are stacked behind the layer, or in
their layer. With `singleton_local_shards` nothing is stacked, and gate and up are two tensors, `_w` and `_v`. The
layouts inside a tensor (query, key and value by groups; gate before up) are those of our checkpoints.

A HybridModel counts attention and MLP as layers of their own, 2i and 2i + 1 for our layer i, and stacks none of them.
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
_FINAL_NORM = ("decoder.final_layernorm.weight", "decoder.final_norm.weight")  # of a GPTModel, of a HybridModel
_ATTENTION = ("input_layernorm.", "self_attention.")


def stacked(name: str, model: ModelRecipe) -> Region:
    """The region of our tensor `name` in a checkpoint with stacked layers, which is what Megatron-LM saves."""
    return next(_regions(name, model, hybrid=False))[0]


def find(name: str, keys: Collection[str], model: ModelRecipe) -> tuple[Region, ...]:
    """The regions that make up our tensor `name`, along its first dimension, among the tensors of a checkpoint.

    Args:
        name: of a tensor of `model`.
        keys: names of the checkpoint's tensors.

    Returns:
        One region, or gate and up; none where the checkpoint does not have the tensor.
    """
    ways = _regions(name, model, hybrid=_FINAL_NORM[1] in keys)
    return next((regions for regions in ways if all(region.key in keys for region in regions)), ())


def _regions(name: str, model: ModelRecipe, *, hybrid: bool) -> Iterator[tuple[Region, ...]]:
    """Every way in which Megatron-Core saves our tensor `name`, the usual one first."""
    inside = _LAYER.fullmatch(name)
    if inside is None:
        yield (Region(_FINAL_NORM[1] if hybrid and name == _FINAL_NORM[0] else name),)
        return
    layer, rest, layers = int(inside[1]), inside[2], model.num_layers
    own = f"{LAYERS}{layer}."
    if hybrid:
        own = f"{LAYERS}{2 * layer + (not rest.startswith(_ATTENTION))}."
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        for spelling in _spellings(rest):
            if not hybrid:
                yield (Region(LAYERS + spelling, (layer,), (layers,)),)
            yield (Region(own + spelling),)
        alone = own + rest
    else:
        number, tail, experts = int(expert[1]), expert[2], model.num_moe_experts or 0
        if not hybrid:
            yield (Region(f"{LAYERS}{EXPERTS}{tail}", (layer, number), (layers, experts)),)
        yield (Region(f"{own}{EXPERTS}{tail}", (number,), (experts,)),)
        alone = f"{own}{EXPERTS}{number}.{tail}"
        yield (Region(alone),)
    if alone.endswith(_GATE_UP):
        yield Region(f"{alone}_w"), Region(f"{alone}_v")


def _spellings(rest: str) -> list[str]:
    return [rest, _FUSED_NORMS[rest]] if rest in _FUSED_NORMS else [rest]
