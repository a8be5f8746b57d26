"""Places of a model's tensors, and of their optimizer state, in a table of contents; the first that does not fit."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch

from minicpm_megatron.convert.formats import minicpm
from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.convert.mapping import EMBEDDING, HEAD
from minicpm_megatron.convert.torch_dist.chunks import Region
from minicpm_megatron.convert.torch_dist.contents import Contents
from minicpm_megatron.convert.torch_dist.names import find
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe

Places = dict[str, tuple[Region, ...]]  # our name -> regions, along the first dimension
MOMENTS = ("exp_avg", "exp_avg_sq")
# fp32 weights of a model in bf16: of Megatron-Core's plain optimizer, and of its distributed one
MASTERS = ("fp32_param", "param")
_OPTIMIZER = re.compile(r"(chained_\d+\.)?optimizer\.")
_STATE = re.compile(r"(?:chained_\d+\.)?optimizer\.state\.(\w+)\.(.+)")
_WEIGHT_TYPES = (torch.float32, torch.bfloat16, torch.float16)
_VOCABULARY = (EMBEDDING.pattern, HEAD.pattern)
_DIVISOR = 128  # Megatron-LM's default of --make-vocab-size-divisible-by


def canonical_shapes(model: ModelRecipe) -> dict[str, Shape]:
    """Our tensors of a model, in reading order, with their shapes."""
    groups = minicpm.FORMAT.import_groups(model)  # the format that holds both kinds of model unfolded
    return {name: group.row.kind.shape(model) for group in groups for name in group.canonical}


def place_weights(contents: Contents, model: ModelRecipe, args: Mapping[str, Any], where: str) -> tuple[Places, int]:
    """Places of the model's tensors.

    Args:
        contents: of the checkpoint.
        args: Megatron-LM's arguments as far as they are known, for the padding of the vocabulary.
        where: for the error line.

    Returns:
        The places, and the rows of padding that the vocabulary has.

    Raises:
        UserError: a tensor is missing, unexpected, of another shape, or of a type that weights do not come in.
    """
    shapes = canonical_shapes(model)
    places = {name: find(name, contents.tensors, model) for name in shapes}
    if absent := [name for name, regions in places.items() if not regions]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"tensor {absent[0]}{more} missing", where=where)
    used = {region.key for regions in places.values() for region in regions}
    for key in sorted(contents.tensors.keys() - used):
        if not _OPTIMIZER.match(key):
            raise UserError(f"unexpected tensor {key}", where=where)
    padding = 0
    for name, regions in places.items():
        first, *rest = shapes[name]
        for region in regions:
            stored, wanted = contents.tensors[region.key], (*region.sizes, first // len(regions), *rest)
            if stored.dtype not in _WEIGHT_TYPES:
                raise UserError(f"tensor {region.key} is stored as {stored.dtype}", where=where)
            if name in _VOCABULARY and stored.shape[:1] > wanted[:1]:
                padding = _padding(contents, region.key, model, args, where)
                wanted = (first + padding, *rest)
            if stored.shape != wanted:
                raise UserError(
                    f"tensor {region.key} has shape {list(stored.shape)}, the model says {list(wanted)}", where=where
                )
    return places, padding


def place_state(contents: Contents, weights: Places, kind: str) -> Places:
    """Return the place of the optimizer's `kind` for each weight. Weights that have none, or one of another shape, are
    left out."""
    keys = {}
    for key in contents.tensors:
        found = _STATE.fullmatch(key)
        if found and found[1] == kind:
            keys[found[2]] = key
    places = {}
    for name, regions in weights.items():
        moved = tuple(region._replace(key=keys.get(region.key, "")) for region in regions)
        pairs = [
            (contents.tensors.get(now.key), contents.tensors[was.key]) for now, was in zip(moved, regions, strict=True)
        ]
        if all(state and (state.dtype, state.shape) == (torch.float32, weight.shape) for state, weight in pairs):
            places[name] = moved
    return places


def has_optimizer(contents: Contents) -> bool:
    """Return whether the checkpoint has optimizer state of any form."""
    return any(_OPTIMIZER.match(key) for key in (*contents.tensors, *contents.objects))


def _padding(contents: Contents, key: str, model: ModelRecipe, args: Mapping[str, Any], where: str) -> int:
    """Rows beyond the vocabulary, which must be fewer than Megatron-LM pads it by."""
    stored = contents.tensors[key]
    divisor, ranks = args.get("make_vocab_size_divisible_by"), args.get("tensor_model_parallel_size")
    ranks = ranks if isinstance(ranks, int) else len({chunk.offsets[0] for chunk in stored.chunks})
    unit = (divisor if isinstance(divisor, int) else _DIVISOR) * ranks
    padding = stored.shape[0] - model.vocab_size
    named = (args.get("vocab_size"), args.get("padded_vocab_size"))
    if padding >= unit and named != (model.vocab_size, stored.shape[0]):
        raise UserError(
            f"tensor {key} has {stored.shape[0]} rows, too many for a vocabulary of {model.vocab_size} padded to a"
            f" multiple of {unit}",
            where=where,
            fix="give the model with the vocabulary that was trained",
        )
    return padding
