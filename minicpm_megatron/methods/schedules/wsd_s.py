"""WSD-S: Warmup-Stable-Decay, simplified (Wen et al., arXiv 2410.05192).

WSD branches: each decay leaves the stable stage, and training goes on from before that decay, so that later checkpoints
gain nothing from it. WSD-S has one branch: training resumes from the decayed checkpoint itself, at the full learning
rate at once, and decays again at the next budget. One run gives a decayed checkpoint at every budget T_k.

With budgets T_1 < ... < T_K = S, decays of the share c of the budget that they end at, and floor m:

    factor(s) = s / W                                     s < W
                1                                         T_(k-1) < s <= (1 - c) T_k
                1 / ((1 - r) + r / m)                     (1 - c) T_k < s <= T_k,  r = (s - (1 - c) T_k) / (c T_k)

Not the learning rate but its reciprocal is interpolated linearly between peak and floor, as in `lr_wsd` of Meta's
lingua, which cites the paper, and `inv` of Stanford's Levanter. Decays that grow with the budget are as in lingua.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from minicpm_megatron.errors import require
from minicpm_megatron.methods.decay_shapes import FLOOR
from minicpm_megatron.methods.schedule import Schedule
from minicpm_megatron.recipe.schema import Length, ScheduleOptions
from minicpm_megatron.registry import SCHEDULES


class WSDSOptions(ScheduleOptions):
    """Keys of `schedule.options` for shape wsd-s."""

    lengths: ClassVar[frozenset[str]] = frozenset({"budgets"})

    budgets: Annotated[tuple[Length, ...], Field(strict=False)] = ()
    """Positions at which earlier decays end, rising, below `total`, where the last decay ends. To go on from a finished
    run, append its `total` and give a later one."""
    decay_share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Length of each decay as a share of the position at which it ends."""


@SCHEDULES.register("wsd-s")
@dataclass(frozen=True, kw_only=True)
class WSDS(Schedule):
    """WSD that resumes from each decayed checkpoint; the formula is the module's.

    Attributes:
        budgets: T_1 to T_(K-1), positions at which decays before the last end.
        decay_share: c.
        min_lr_ratio: m, above 0.

    Raises:
        UserError: budgets that do not rise to `total`, or decays that do not fit between them.
    """

    uses = frozenset({"min_lr_ratio"})
    options = WSDSOptions

    budgets: tuple[float, ...] = ()
    decay_share: float
    min_lr_ratio: float = FLOOR

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.min_lr_ratio > 0,
            "schedule.min_lr_ratio",
            "the reciprocal of the learning rate is interpolated, and that of 0 is infinite",
            "give a floor above 0, or null for 0.1",
        )
        for before, end in itertools.pairwise((self.warmup, *self._ends)):
            require(
                before <= self._decay_start(end) and before < end,
                "schedule.options.budgets",
                f"the decay that ends at {end:,} would begin at {self._decay_start(end):,.6g}, before {before:,}, where"
                " the warmup or the decay before it ends",
                "move the budgets apart, or give a smaller schedule.options.decay_share",
            )

    @property
    def _ends(self) -> tuple[float, ...]:
        return *self.budgets, self.total

    def _decay_start(self, end: float) -> float:
        return (1 - self.decay_share) * end

    def after_warmup(self, position: float) -> float:
        end = next(end for end in self._ends if position <= end)
        start = self._decay_start(end)
        if position <= start:
            return 1.0
        progress = (position - start) / (end - start)
        return 1 / ((1 - progress) + progress / self.min_lr_ratio)

    def describe(self, lr: float | None = None) -> str:
        ends = " and ".join(f"{end:,}" for end in self._ends)
        return "WSD-S: " + self.line(f"decays over {self.decay_share:.4g} of what comes before {ends}", lr)

    def landmarks(self) -> list[tuple[str, float]]:
        *marks, last = super().landmarks()
        for number, end in enumerate(self._ends, start=1):
            marks.append((f"decay {number} begins", self._decay_start(end)))
            marks.append((f"decay {number} ends", end))
        return [*marks[:-1], last]

    @property
    def decay_start(self) -> float:
        return self._decay_start(self.total)
