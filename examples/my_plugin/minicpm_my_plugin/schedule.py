"""A schedule is a dataclass below Schedule that says which keys of a recipe it reads, and its factor after the warmup.

This one is the step decay of DeepSeek-V2-Lite (its model card, "Training Details"): the learning rate is multiplied by
0.316 after 80 % of the tokens, and again after 90 %. With shares c_1 < c_2 < ... of the run and ratio q:

    factor(s) = q^k,  k the number of shares with s > c_i S
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from minicpm_megatron.methods.schedule import Schedule
from minicpm_megatron.recipe import ScheduleOptions


class StepDecayOptions(ScheduleOptions):
    """Keys of `schedule.options` for shape my-step-decay."""

    shares: Annotated[tuple[Annotated[float, Field(gt=0, lt=1)], ...], Field(strict=False)] = (0.8, 0.9)
    """Shares of the run after which the learning rate falls."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.316
    """Factor on the learning rate after each share."""


@dataclass(frozen=True, kw_only=True)
class StepDecay(Schedule):
    """The formula is the module's.

    Attributes:
        shares: c_1, c_2, ...
        ratio: q.
    """

    options = StepDecayOptions

    shares: tuple[float, ...]
    ratio: float

    def after_warmup(self, position: float) -> float:
        return self.ratio ** sum(position > share * self.total for share in self.shares)

    def describe(self, lr: float | None = None) -> str:
        shares = " and ".join(f"{share:.4g}" for share in self.shares)
        return "step decay: " + self.line(f"times {self.ratio:g} after {shares} of the run", lr)

    def landmarks(self) -> list[tuple[str, float]]:
        *marks, last = super().landmarks()
        return [*marks, *(("step down", share * self.total) for share in self.shares), last]
