"""CosineLoop of appendix B.1 (arXiv 2404.06395)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minicpm_megatron.errors import require
from minicpm_megatron.methods.decay_shapes import FLOOR
from minicpm_megatron.methods.schedule import Schedule
from minicpm_megatron.recipe.schema import ScheduleRecipe
from minicpm_megatron.registry import SCHEDULES


@SCHEDULES.register("cosine_loop")
@dataclass(frozen=True, kw_only=True)
class CosineLoop(Schedule):
    """CosineLoop(T), appendix B.1: 0.9 (1 + cos(pi s / T)) / 2 + 0.1 for ever, rising again after T.

    Attributes:
        period: T, position of the first minimum; s counts from the start of the run, warmup included.
        min_lr_ratio: the 0.1 of the formula.
    """

    uses = frozenset({"period", "min_lr_ratio"})

    period: float
    min_lr_ratio: float = FLOOR

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.period > 0, "schedule.period", f"{self.period} is not a length")

    @classmethod
    def _fields_of(cls, section: ScheduleRecipe) -> dict[str, Any]:
        return {"period": section.total} | super()._fields_of(section)

    def after_warmup(self, position: float) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * position / self.period)) / 2

    def describe(self, lr: float | None = None) -> str:
        return f"{type(self).__name__}: " + self.line(f"cosine with its minimum at {self.period:,}", lr)

    def landmarks(self) -> list[tuple[str, float]]:
        first = [("cosine minimum", self.period)] if self.period < self.total else []
        inner = [(f"{share:.0%} of the run", share * self.total) for share in (0.25, 0.5, 0.75)]
        return sorted([*super().landmarks(), *first, *inner], key=lambda mark: mark[1])
