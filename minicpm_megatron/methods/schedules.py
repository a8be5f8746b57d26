"""Learning-rate schedules of section 4 and appendix B.1 (arXiv 2404.06395) as pure functions of a position.

A schedule answers one question: which fraction of the base rate does an update use?

Where an update stands. Position s counts steps or tokens (`unit`), and an update stands where it ends: the first
update of a run in steps is s = 1, the last s = S; in tokens the first stands at its own size. So the paper's formulas
hold at every s as printed, no update is wasted on the rate 0 of s = 0, the last update of warmup uses the full rate,
and the last update of the run the rate that is announced as the rate at the end. A checkpoint after update s is at
position s; the first update that decays from it has progress 1 / d.

Counted in tokens a curve does not move when the batch grows in mid-run; counted in steps it stretches.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.recipe.schema import ScheduleRecipe
from minicpm_megatron.registry import DECAY_SHAPES

FLOOR = 0.1  # appendix B.1: Cosine ends at 0.1 of the rate; the authors' posted WSD code decays to 10 % as well


@dataclass(frozen=True)
class DecaySettings:
    """What a decay shape may use besides the progress: d and H in the schedule's unit, and the floor in [0, 1)."""

    length: float
    half_life: float | None
    min_lr_ratio: float


DecayShape = Callable[[float, DecaySettings], float]
"""f(r, settings) for progress r in (0, 1]: decreasing, 0 <= f <= 1, and towards 1 for r towards 0."""


def as_decay_shape(entry: Any) -> DecayShape:
    """`entry`, which must be a function.

    Raises:
        TypeError: it is none.
    """
    if not callable(entry):
        raise TypeError(f"a decay shape must be a function, not {type(entry).__name__}")
    shape: DecayShape = entry
    return shape


def _above_floor(curve: float, settings: DecaySettings) -> float:
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * curve


@DECAY_SHAPES.register("exponential")
def exponential(progress: float, settings: DecaySettings) -> float:
    """0.5^((s - T) / H), cut off at the floor: section 4.2's f with the half-life reading of section 6.2."""
    if settings.half_life is None:
        raise UserError("exponential decay needs its half-life", where="schedule.half_life", fix="give it")
    return float(max(settings.min_lr_ratio, 0.5 ** (progress * settings.length / settings.half_life)))


@DECAY_SHAPES.register("linear")
def linear(progress: float, settings: DecaySettings) -> float:
    """1 - r above the floor; with the floor 0.1 the authors' posted code."""
    return _above_floor(1 - progress, settings)


@DECAY_SHAPES.register("cosine")
def cosine(progress: float, settings: DecaySettings) -> float:
    """(1 + cos(pi r)) / 2 above the floor."""
    return _above_floor((1 + math.cos(math.pi * progress)) / 2, settings)


@DECAY_SHAPES.register("1-sqrt")
def one_minus_sqrt(progress: float, settings: DecaySettings) -> float:
    """1 - sqrt(r) above the floor (arXiv 2405.18392)."""
    return _above_floor(1 - math.sqrt(progress), settings)


@DECAY_SHAPES.register("megatron-exponential")
def megatron_exponential(progress: float, settings: DecaySettings) -> float:
    """2 x 0.5^r - 1 above the floor: what Megatron-LM calls exponential; it has no half-life of its own."""
    return _above_floor(2 * 0.5**progress - 1, settings)


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A curve of rates after a linear warmup.

    Attributes:
        total: S, length of the run.
        warmup: W; below it the factor is s / W.
        unit: what all lengths and positions count.
    """

    total: float
    warmup: float = 0
    unit: Literal["steps", "tokens"] = "steps"

    def __post_init__(self) -> None:
        require(self.total > 0, "schedule.total", f"{self.total} is not a length")
        require(0 <= self.warmup <= self.total, "schedule.warmup", f"{self.warmup} does not fit into {self.total}")

    def factor(self, position: float) -> float:
        """Fraction of the base rate for the update that ends at `position` (> 0); after `total` that of `total`."""
        if position < self.warmup:
            return position / self.warmup
        return self._after_warmup(min(position, self.total))

    @abstractmethod
    def _after_warmup(self, position: float) -> float: ...

    @property
    def end_factor(self) -> float:
        """The factor of the last update."""
        return self.factor(self.total)

    @abstractmethod
    def describe(self, lr: float | None = None) -> str:
        """One line for people; with the base rate `lr` it ends with the rate at the end."""

    def landmarks(self) -> list[tuple[str, float]]:
        """(what happens, position) in order: the places where a reader wants to see the rate."""
        marks = [("warmup ends", self.warmup)] if self.warmup else []
        return [*marks, ("run ends", self.total)]

    def _line(self, body: str, lr: float | None) -> str:
        warmup = f"{self.warmup:,} {self.unit} of warmup, " if self.warmup else ""
        rate = "" if lr is None else f", which is {lr * self.end_factor:.3g}"
        return f"{warmup}{body}; ends after {self.total:,} {self.unit} at {self.end_factor:.4g} of the rate{rate}"


@dataclass(frozen=True, kw_only=True)
class WSD(Schedule):
    """Warmup-Stable-Decay, equation 1: s/W, then 1 until T = S - d, then f((s - T) / d).

    Attributes:
        decay: d; 0 for a trunk that only branches.
        decay_shape: a name in `DECAY_SHAPES`.
        half_life: H of the exponential shape, in the schedule's unit; independent of d.
        min_lr_ratio: floor; None for the shape's own, 0 for exponential and 0.1 for all others.

    Raises:
        UserError: lengths that do not fit, an unknown shape, or a shape that is no decay at all.
    """

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
        DECAY_SHAPES.check(self.decay_shape, where="schedule.decay_shape")
        before = 1.0
        # a shape of another package must decay, or a run would end somewhere that nobody asked for
        for step in range(1, 101 if self.decay else 1):
            try:
                value = DECAY_SHAPES.get(self.decay_shape)(step / 100, self.settings)
            except (TypeError, ValueError, ArithmeticError) as error:
                what = f"{self.decay_shape!r} fails at progress {step / 100}: {type(error).__name__}: {error}"
                raise UserError(what, where="schedule.decay_shape") from error
            require(
                isinstance(value, (int, float)) and 0 <= value <= before,
                "schedule.decay_shape",
                f"{self.decay_shape!r} is {value!r} at progress {step / 100}, which is not between 0 and {before}",
            )
            before = value

    @property
    def stable_end(self) -> float:
        """T, where the decay begins."""
        return self.total - self.decay

    @property
    def settings(self) -> DecaySettings:
        """What the decay shape is called with."""
        own = 0.0 if self.decay_shape == "exponential" else FLOOR
        return DecaySettings(self.decay, self.half_life, own if self.min_lr_ratio is None else self.min_lr_ratio)

    def _after_warmup(self, position: float) -> float:
        if position <= self.stable_end:
            return 1.0
        shape: DecayShape = DECAY_SHAPES.get(self.decay_shape)
        return shape((position - self.stable_end) / self.decay, self.settings)

    def describe(self, lr: float | None = None) -> str:
        half_life = f" (half-life {self.half_life:,.12g})" if self.half_life is not None else ""
        decay = f", {self.decay_shape} decay over {self.decay:,}{half_life}" if self.decay else ", no decay"
        return "WSD: " + self._line(f"stable to {self.stable_end:,}{decay}", lr)

    def landmarks(self) -> list[tuple[str, float]]:
        marks = super().landmarks()
        if not self.decay:
            return marks
        inner = [(f"{share:.0%} of decay", self.stable_end + share * self.decay) for share in (0.25, 0.5, 0.75)]
        return [*marks[:-1], ("stable ends", self.stable_end), *inner, marks[-1]]


@dataclass(frozen=True, kw_only=True)
class CosineLoop(Schedule):
    """CosineLoop(T), appendix B.1: 0.9 (1 + cos(pi s / T)) / 2 + 0.1 for ever, rising again after T.

    Attributes:
        period: T, position of the first minimum; s counts from the start of the run, warmup included.
        min_lr_ratio: the 0.1 of the formula.
    """

    period: float
    min_lr_ratio: float = FLOOR

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.period > 0, "schedule.period", f"{self.period} is not a length")

    def _after_warmup(self, position: float) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * (1 + math.cos(math.pi * position / self.period)) / 2

    def describe(self, lr: float | None = None) -> str:
        return f"{type(self).__name__}: " + self._line(f"cosine with its minimum at {self.period:,}", lr)

    def landmarks(self) -> list[tuple[str, float]]:
        first = [("cosine minimum", self.period)] if self.period < self.total else []
        inner = [(f"{share:.0%} of the run", share * self.total) for share in (0.25, 0.5, 0.75)]
        return sorted([*super().landmarks(), *first, *inner], key=lambda mark: mark[1])


@dataclass(frozen=True, kw_only=True)
class Cosine(CosineLoop):
    """Cosine(T), appendix B.1: as CosineLoop until T, then 0.1 of the rate."""

    def _after_warmup(self, position: float) -> float:
        return super()._after_warmup(min(position, self.period))


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """The full rate after warmup."""

    total: float = math.inf

    def _after_warmup(self, position: float) -> float:
        return 1.0

    def describe(self, lr: float | None = None) -> str:
        return "constant: " + self._line("the full rate", lr)


def build_schedule(recipe: ScheduleRecipe) -> Schedule:
    """The schedule that a recipe describes."""
    common: dict[str, Any] = {"total": recipe.total, "warmup": recipe.warmup, "unit": recipe.unit}
    if recipe.shape == "wsd":
        return WSD(
            **common,
            decay=recipe.decay or 0,
            decay_shape=recipe.decay_shape,
            half_life=recipe.half_life,
            min_lr_ratio=recipe.min_lr_ratio,
        )
    if recipe.shape == "constant":
        return Constant(**common)
    floor = FLOOR if recipe.min_lr_ratio is None else recipe.min_lr_ratio
    common |= {"period": recipe.period or recipe.total, "min_lr_ratio": floor}
    return Cosine(**common) if recipe.shape == "cosine" else CosineLoop(**common)


def branch_schedule(
    trunk: Schedule,
    *,
    at: float,
    decay: float,
    decay_shape: str = "exponential",
    half_life: float | None = None,
    min_lr_ratio: float | None = None,
) -> WSD:
    """The trunk up to `at`, then a decay of its own: WSD(at, decay) of section 4.2. The trunk stays as it is.

    Raises:
        UserError: the trunk has no stable stage, or `at` is not in it.
    """
    if not isinstance(trunk, (WSD, Constant)):
        raise UserError(f"{trunk.describe()} has no stable stage to leave", where="schedule.shape")
    stable_end = trunk.stable_end if isinstance(trunk, WSD) else trunk.total
    require(
        trunk.warmup <= at <= stable_end,
        "schedule",
        f"position {at:,} is not in the trunk's stable stage, {trunk.warmup:,} to {stable_end:,} {trunk.unit}",
    )
    require(decay > 0, "schedule.decay", f"{decay} is not a length for a branch")
    return WSD(
        total=at + decay,
        warmup=trunk.warmup,
        unit=trunk.unit,
        decay=decay,
        decay_shape=decay_shape,
        half_life=half_life,
        min_lr_ratio=min_lr_ratio,
    )
