"""The power schedule (Shen et al., arXiv 2408.13359): a learning rate that depends on the tokens so far and the batch.

With n the tokens consumed, beta the batch, N the length of the run and d that of its decay (equations 7 and 8):

    lr_power(n) = min(lr_max, beta a n^b)

    lr(n) = n / W lr_power(W)               n < W
            lr_power(n)                     W < n <= N - d
            f(...) lr_power(N - d)          N - d < n,  f the decay shape

It does not depend on N, so a run can be stopped or lengthened at will, and a, b and lr_max are meant to transfer over
batch sizes, lengths and (under muP) widths: the paper takes a = 4, b = -0.51 and lr_max = 0.02 (section 4).

The paper's beta counts sequences of 4,096 tokens (Tables 2 and 3). Here it is the batch's tokens / 4,096, so that a
step of as many tokens has the same learning rate whatever the length of its sequences. lr_max is `optimizer.lr`: the
factor is min(1, beta a n^b / lr_max), and under muP every group keeps its share of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Self

from pydantic import Field

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.methods.schedules.wsd import WSD
from minicpm_megatron.recipe.batches import BatchPlan
from minicpm_megatron.recipe.schema import Positive, Recipe, ScheduleOptions, ScheduleRecipe
from minicpm_megatron.registry import SCHEDULES

SEQUENCE = 4096
"""Tokens of the sequences that the paper's batch counts."""


class PowerOptions(ScheduleOptions):
    """Keys of `schedule.options` for shape power."""

    amplitude: Positive = 4.0
    """a: learning rate for each sequence of 4,096 tokens in the batch, at n^b = 1 (arXiv 2408.13359, section 4)."""
    exponent: Annotated[float, Field(le=0, allow_inf_nan=False)] = -0.51
    """b: power of the tokens so far that the learning rate falls with (arXiv 2408.13359, section 4)."""


@SCHEDULES.register("power")
@dataclass(frozen=True, kw_only=True)
class Power(WSD):
    """WSD whose stable stage falls with the tokens and rises with the batch; the formula is the module's.

    The decay's floor is relative to the learning rate at which the decay begins.

    Attributes:
        lr: lr_max, the base learning rate that the factors are fractions of.
        batches: (first, tokens) of each batch size in order: updates that end after position `first` have so many
            tokens.
        amplitude: a.
        exponent: b.

    Raises:
        UserError: the schedule does not count tokens; or as `WSD`.
    """

    options = PowerOptions

    lr: float
    batches: tuple[tuple[float, float], ...]
    amplitude: float
    exponent: float

    def __post_init__(self) -> None:
        require(self.unit == "tokens", "schedule.unit", "the power schedule counts tokens", "set schedule.unit=tokens")
        super().__post_init__()

    @classmethod
    def from_recipe(cls, section: ScheduleRecipe, recipe: Recipe | None = None) -> Self:
        if recipe is None:
            what = "the power schedule depends on optimizer.lr and the batch"
            raise UserError(what, where="schedule.shape", fix="give a whole recipe")
        plan = BatchPlan(recipe)
        batches = tuple(
            (phase.first_sample * plan.sequence_length, phase.global_batch_size * plan.sequence_length)
            for phase in plan.phases
        )
        return cls(**cls._fields_of(section), lr=recipe.optimizer.lr, batches=batches)

    def stable(self, position: float) -> float:
        tokens = next(tokens for first, tokens in reversed(self.batches) if first < position)
        return min(1.0, tokens / SEQUENCE * self.amplitude * math.pow(position, self.exponent) / self.lr)

    @property
    def peak(self) -> float:
        return self.after_warmup(self.warmup) if self.warmup else 1.0

    def describe(self, lr: float | None = None) -> str:
        curve = f"batch / {SEQUENCE:,} x {self.amplitude:g} n^{self.exponent:g}, at most {self.lr:g}"
        return "power: " + self.line(f"{curve}, to {self.stable_end:,}, {self._decay_in_words()}", lr)
