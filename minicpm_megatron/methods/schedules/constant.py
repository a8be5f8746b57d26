"""The constant schedule."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from minicpm_megatron.methods.schedule import Schedule
from minicpm_megatron.methods.schedules.wsd import WSD
from minicpm_megatron.registry import SCHEDULES


@SCHEDULES.register("constant")
@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The full rate after warmup."""

    total: float = math.inf

    def after_warmup(self, position: float) -> float:
        return 1.0

    def describe(self, lr: float | None = None) -> str:
        return "constant: " + self.line("the full rate", lr)

    @property
    def stable_stage(self) -> tuple[float, float]:
        return self.warmup, self.total

    def branch(self, at: float, decay: float, **settings: Any) -> WSD:
        return WSD(total=at + decay, warmup=self.warmup, unit=self.unit, decay=decay, **settings)
