"""A user's own DeepSpeed JSON: read, and what it says about sizes that an estimate needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe.schema import Recipe


@dataclass(frozen=True)
class ZeroSizes:
    """Sizes of DeepSpeed's zero_optimization in elements, with the defaults of 0.19.

    Attributes:
        reduce_bucket_size: gradients that are reduced at once; None: `memory.reduce_bucket_size` decides.
        max_live_parameters: stage3_max_live_parameters; as many are gathered at once.
        prefetch_bucket_size: stage3_prefetch_bucket_size; gathered ahead of use in one message.
        param_persistence_threshold: stage3_param_persistence_threshold; smaller parameters stay gathered for good.
    """

    reduce_bucket_size: int | None = None
    max_live_parameters: int = 1_000_000_000
    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000


KEYS = {
    "reduce_bucket_size": "reduce_bucket_size",
    "stage3_max_live_parameters": "max_live_parameters",
    "stage3_prefetch_bucket_size": "prefetch_bucket_size",
    "stage3_param_persistence_threshold": "param_persistence_threshold",
}


def zero_sizes(recipe: Recipe) -> ZeroSizes:
    """What `deepspeed.config` makes of the sizes; anything but a number leaves the default.

    Raises:
        UserError: the JSON cannot be read.
    """
    if recipe.deepspeed.config is None:
        return ZeroSizes()
    zero = read_deepspeed_json(Path(recipe.deepspeed.config)).get("zero_optimization")
    given = zero.items() if isinstance(zero, dict) else ()
    return ZeroSizes(
        **{KEYS[key]: int(value) for key, value in given if key in KEYS and isinstance(value, int | float)}
    )


def read_deepspeed_json(path: Path) -> dict[str, Any]:
    """The object in a user's file.

    Raises:
        UserError: no file, no JSON, no object, or a key given twice.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise UserError(
            f"cannot read the DeepSpeed JSON: {error.strerror}", where=str(path), fix="check deepspeed.config"
        ) from None
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where=str(path), fix="correct the file") from None
    if not isinstance(content, dict):
        raise UserError("the DeepSpeed JSON is not an object", where=str(path), fix="put its keys in braces")
    return content


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"key {key!r} is given twice")
    return dict(pairs)
