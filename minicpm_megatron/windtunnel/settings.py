"""What the settings of several experiments must be; each check names the option that is wrong."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from minicpm_megatron.errors import require


def check_different(option: str, values: Collection[object], what: str, least: int = 1) -> None:
    """Raises UserError: a value is given twice, or there are less than `least`."""
    many = "" if least == 1 else f"at least {least} "
    require(len(set(values)) == len(values) >= least, option, f"not a list of {many}different {what}")


def are_different_and_positive(values: Collection[float], least: int = 1) -> bool:
    """Whether all are finite, above 0 and given once, and there are `least` or more."""
    return len(set(values)) == len(values) >= least and all(0 < value < math.inf for value in values)


def check_range(option: str, values: Sequence[float]) -> None:
    """Raises UserError: not two positive, finite numbers of which the second is larger."""
    rising = len(values) == 2 and 0 < values[0] < values[1] < math.inf
    require(rising, option, "not two positive numbers of which the second is larger")


def check_share(option: str, value: float) -> None:
    """Raises UserError: not between 0 and 1."""
    require(0 < value < 1, option, f"{value:g} is no share between 0 and 1")
