"""What limits say about a claim."""

from __future__ import annotations

from collections.abc import Sequence

from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.windtunnel.results import Verdict

EQUAL = 0.005
"""Losses that differ by less than this share count as equal: ours, the paper compares curves by eye."""


def above(limits: Interval, value: float = 0.0) -> Verdict:
    """Whether a number lies above a value."""
    return True if limits.low > value else False if limits.high < value else "undecided"


def at_most(limits: Interval, margin: float) -> Verdict:
    """Whether a difference is no more than a margin above 0."""
    return True if limits.high < margin else False if limits.low > margin else "undecided"


def holds(limits: Interval, value: float) -> Verdict:
    """Whether a number can be a value: False where its limits leave the value out, undecided where there are none."""
    if not limits.is_bounded:
        return "undecided"
    return value in limits


def within(limits: Interval, low: float, high: float) -> Verdict:
    """Whether a number lies between two values."""
    inside, outside = low < limits.low and limits.high < high, limits.high < low or limits.low > high
    return True if inside else False if outside else "undecided"


def below(limits: Interval, other: Interval) -> Verdict:
    """Whether a number lies below another one; undecided where their limits overlap."""
    return True if limits.high < other.low else False if limits.low > other.high else "undecided"


def opposite(verdict: Verdict) -> Verdict:
    """What limits say about the contrary of a claim."""
    return verdict if verdict == "undecided" else not verdict


def all_of(verdicts: Sequence[Verdict | None]) -> Verdict:
    """Agrees where every part does, disagrees where one does; what was not measured (None) leaves it open."""
    if not verdicts or None in verdicts:
        return "undecided"
    if any(verdict is False for verdict in verdicts):
        return False
    return True if all(verdict is True for verdict in verdicts) else "undecided"
