"""A JSON file that somebody else wrote, and its fields, read with care."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError


def read_json(path: Path, largest: int = 256 * 2**20) -> dict[str, Any]:
    """A JSON object from a file that somebody else wrote, of `largest` bytes at most.

    Raises:
        UserError: absent, unreadable, too large, too deep, or not an object.
    """
    try:
        if path.stat().st_size > largest:
            raise UserError(f"larger than {largest >> 20} MiB", where=str(path))
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"not readable as JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path))
    return value


def number(config: Mapping[str, Any], key: str, default: float | None = None) -> float:
    """A numeric field of config.json as float.

    Raises:
        UserError: absent without a default, or not a finite number.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{key} must be a number, not {value!r}" if key in config else f"{key} is missing")
    # Python reads NaN and Infinity from JSON, and whole numbers of any length
    if not -sys.float_info.max <= value <= sys.float_info.max:
        raise UserError(f"{key} must be a finite number, not {str(value)[:40]}")
    return float(value)


def refuse_endless(config: Mapping[str, Any]) -> None:
    """Refuse whole numbers that no program counts with; Python reads them, and then fails where it first divides.

    Raises:
        UserError: naming the key.
    """
    for key, value in config.items():
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            raise UserError(f"{key} is a number of {len(str(abs(value)))} digits")
