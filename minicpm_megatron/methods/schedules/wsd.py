"""Warmup-Stable-Decay (section 4, arXiv 2404.06395)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Self

from minicpm_megatron.errors import require
from minicpm_megatron.methods.decay_shapes import DecaySettings, DecayShape, decay_settings
from minicpm_megatron.methods.schedule import Schedule
from minicpm_megatron.registry import DECAY_SHAPES, SCHEDULES


@SCHEDULES.register("wsd")
@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    """Warmup-Stable-Decay, equation 1: s/W, then 1 until T = S - d, then f((s - T) / d).

    A schedule with another curve before its decay is a subclass with a `stable` of its own.

    Attributes:
        decay: d; 0 for a trunk that only branches.
        decay_shape: a name in `DECAY_SHAPES`.
        half_life: H of a shape that uses one, in the schedule's unit; independent of d.
        min_lr_ratio: floor; None for the shape's own, 0 for exponential and 0.1 for the others of ours.

    Raises:
        UserError: lengths that do not fit, or as `decay_settings`.
    """

    uses = frozenset({"decay", "decay_shape", "half_life", "min_lr_ratio"})

    decay: float
    decay_shape: str = "exponential"
    half_life: float | None = None
    min_lr_ratio: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            0 <= self.decay <= self.total - self.warmup,
            "schedule.decay",
            f"{self.decay} does not fit into {self.total} after a warmup of {self.warmup}",
        )
        _ = self.settings  # refuses a shape that is no decay

    @cached_property
    def settings(self) -> DecaySettings:
        """What the decay shape is called with."""
        return decay_settings(
            self.decay_shape, length=self.decay, half_life=self.half_life, min_lr_ratio=self.min_lr_ratio
        )

    @property
    def stable_end(self) -> float:
        """T, where the decay begins."""
        return self.total - self.decay

    def stable(self, position: float) -> float:
        """The factor between warmup and decay; the decay multiplies its value at T."""
        return 1.0

    def after_warmup(self, position: float) -> float:
        if position <= self.stable_end:
            return self.stable(position)
        shape: DecayShape = DECAY_SHAPES.get(self.decay_shape)
        return self.stable(self.stable_end) * shape((position - self.stable_end) / self.decay, self.settings)

    def describe(self, lr: float | None = None) -> str:
        return "WSD: " + self.line(f"stable to {self.stable_end:,}, {self._decay_in_words()}", lr)

    def _decay_in_words(self) -> str:
        if not self.decay:
            return "no decay"
        half_life = f" (half-life {self.half_life:,.12g})" if self.half_life is not None else ""
        return f"{self.decay_shape} decay over {self.decay:,}{half_life}"

    def landmarks(self) -> list[tuple[str, float]]:
        marks = super().landmarks()
        if not self.decay:
            return marks
        inner = [(f"{share:.0%} of decay", self.stable_end + share * self.decay) for share in (0.25, 0.5, 0.75)]
        return [*marks[:-1], ("stable ends", self.stable_end), *inner, marks[-1]]

    @property
    def stable_stage(self) -> tuple[float, float]:
        return self.warmup, self.stable_end

    @property
    def decay_start(self) -> float | None:
        return self.stable_end if self.decay else None

    def branch(self, at: float, decay: float, **settings: Any) -> Self:
        return dataclasses.replace(self, total=at + decay, decay=decay, **settings)
