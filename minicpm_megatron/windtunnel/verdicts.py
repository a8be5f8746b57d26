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


def all_of(verdicts: Sequence[Verdict | None]) -> Verdict:
    """Agrees where every part does, disagrees where one does; what was not measured (None) leaves it open."""
    if not verdicts or None in verdicts:
        return "undecided"
    if any(verdict is False for verdict in verdicts):
        return False
    return True if all(verdict is True for verdict in verdicts) else "undecided"
