"""Fields of a config.json, read with care."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minicpm_megatron.errors import UserError


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A numeric field of config.json as float.

    Raises:
        UserError: absent without a default, or not a number.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key} must be a number, not {value!r}" if key in config else f"{key} is missing")
    return float(value)
