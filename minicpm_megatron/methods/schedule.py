"""A learning-rate schedule as a pure function of a position, and what the rest of the package asks of one.

A schedule answers one question: which fraction of the base rate does an update use?

Where an update stands. Position s counts steps or tokens (`unit`), and an update stands where it ends: the first
update of a run in steps is s = 1, the last s = S; in tokens the first stands at its own size. So the paper's formulas
hold at every s as printed, no update is wasted on the rate 0 of s = 0, the last update of warmup uses the full rate,
and the last update of the run the rate that is announced as the rate at the end. A checkpoint after update s is at
position s; the first update that decays from it has progress 1 / d.

Counted in tokens a curve does not move when the batch grows in mid-run; counted in steps it stretches.

Each schedule of ours is one file of `methods/schedules/`; another package declares a subclass of `Schedule` in the
entry-point group `minicpm_megatron.schedules`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.recipe.load import build_options
from minicpm_megatron.recipe.schema import SHARED_SCHEDULE_KEYS, Recipe, ScheduleOptions, ScheduleRecipe
from minicpm_megatron.registry import SCHEDULES

Unit = Literal["steps", "tokens"]


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """A curve of rates after a linear warmup.

    A subclass writes `after_warmup` and `describe`, and says in `uses` and `options` which keys of a recipe's schedule
    section it reads. The fields of its dataclass have the names of those keys.

    Attributes:
        uses: keys of `SHARED_SCHEDULE_KEYS` that it reads; a recipe that gives another one is refused. One that uses
            `decay` needs it given.
        options: keys of its own, below `schedule.options`.
        total: S, length of the run.
        warmup: W; below it the factor is s / W.
        unit: what all lengths and positions count.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    options: ClassVar[type[ScheduleOptions]] = ScheduleOptions

    total: float
    warmup: float = 0
    unit: Unit = "steps"

    def __post_init__(self) -> None:
        require(self.total > 0, "schedule.total", f"{self.total} is not a length")
        require(0 <= self.warmup <= self.total, "schedule.warmup", f"{self.warmup} does not fit into {self.total}")

    def check_curve(self) -> None:
        """See that the schedule gives a learning rate everywhere.

        Raises:
            UserError: at a hundredth of the run it fails, or gives what is no finite number from 0 on.
        """
        for part in range(1, 101):
            position = self.total * part / 100
            try:
                value = self.factor(position)
            except (TypeError, ValueError, LookupError, ArithmeticError) as error:
                what = f"fails at position {position:,}: {type(error).__name__}: {error}"
                raise UserError(what, where="schedule.shape") from error
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                what = f"gives {value!r} at position {position:,}, which is no learning rate"
                raise UserError(what, where="schedule.shape")

    @classmethod
    def from_recipe(cls, section: ScheduleRecipe, recipe: Recipe | None = None) -> Self:
        """The schedule that a recipe's section describes.

        Args:
            section: checked by `recipe.checks`.
            recipe: the recipe around it, for a schedule that depends on more than its section; None: there is none.

        Raises:
            UserError: lengths or options that do not fit, or a schedule that needs the recipe around its section.
        """
        return cls(**cls._fields_of(section))

    @classmethod
    def _fields_of(cls, section: ScheduleRecipe) -> dict[str, Any]:
        """The dataclass's fields that `section` gives; those that are null there are left to their defaults."""
        keys = ("total", "warmup", "unit", *cls.uses)
        given = {key: getattr(section, key) for key in keys if getattr(section, key) is not None}
        return given | dict(build_options(cls.options, section.options, key="schedule.options"))

    def factor(self, position: float) -> float:
        """Fraction of the base rate for the update that ends at `position` (> 0); after `total` that of `total`."""
        if position < self.warmup:
            return position / self.warmup * self.peak
        return self.after_warmup(min(position, self.total))

    @abstractmethod
    def after_warmup(self, position: float) -> float:
        """Fraction of the base rate for the update that ends at `position`, from `warmup` to `total`."""

    @property
    def peak(self) -> float:
        """The factor that the warmup rises to."""
        return 1.0

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

    @property
    def stable_stage(self) -> tuple[float, float] | None:
        """First and last position that a decay of its own may leave from; None: there is no such stage."""
        return None

    @property
    def decay_start(self) -> float | None:
        """Where the decay that ends the run begins; None: the run does not end with one."""
        return None

    def branch(self, at: float, decay: float, **settings: Any) -> Schedule:
        """This schedule up to `at`, a position of the stable stage, and then a decay of its own.

        Args:
            settings: decay_shape, half_life and min_lr_ratio of that decay.
        """
        raise NotImplementedError(f"{type(self).__name__} has a stable stage and defines no branch")

    def line(self, body: str, lr: float | None) -> str:
        """`body` with the warmup before it and the end behind it, for `describe`."""
        warmup = f"{self.warmup:,} {self.unit} of warmup, " if self.warmup else ""
        rate = "" if lr is None else f", which is {lr * self.end_factor:.3g}"
        return f"{warmup}{body}; ends after {self.total:,} {self.unit} at {self.end_factor:.4g} of the rate{rate}"


def as_schedule(entry: Any) -> type[Schedule]:
    """`entry`, which must be a subclass of Schedule that can be constructed from a recipe.

    Raises:
        TypeError: it is not.
    """
    if not (isinstance(entry, type) and issubclass(entry, Schedule)):
        raise TypeError(f"a schedule must be a subclass of Schedule, not {entry!r}")
    if entry.__abstractmethods__:
        raise TypeError(f"{entry.__name__} does not define {', '.join(sorted(entry.__abstractmethods__))}")
    unknown = sorted(entry.uses - SHARED_SCHEDULE_KEYS)
    if unknown:
        raise TypeError(f"{entry.__name__} uses {', '.join(unknown)}, of {', '.join(sorted(SHARED_SCHEDULE_KEYS))}")
    if not issubclass(entry.options, ScheduleOptions):
        raise TypeError(f"the options of {entry.__name__} must be a subclass of ScheduleOptions")
    return entry


def build_schedule(recipe: Recipe | ScheduleRecipe) -> Schedule:
    """The schedule that a recipe describes; its section alone is enough for one that depends on nothing else.

    Raises:
        UserError: as `Schedule.from_recipe`.
    """
    section, around = (recipe.schedule, recipe) if isinstance(recipe, Recipe) else (recipe, None)
    kind: type[Schedule] = SCHEDULES.get(section.shape)
    return kind.from_recipe(section, around)


def branch_schedule(
    trunk: Schedule,
    *,
    at: float,
    decay: float,
    decay_shape: str = "exponential",
    half_life: float | None = None,
    min_lr_ratio: float | None = None,
) -> Schedule:
    """The trunk up to `at`, then a decay of its own: WSD(at, decay) of section 4.2. The trunk stays as it is.

    Raises:
        UserError: the trunk has no stable stage, or `at` is not in it.
    """
    if trunk.stable_stage is None:
        raise UserError(f"{trunk.describe()} has no stable stage to leave", where="schedule.shape")
    first, last = trunk.stable_stage
    require(
        first <= at <= last,
        "schedule",
        f"position {at:,} is not in the trunk's stable stage, {first:,} to {last:,} {trunk.unit}",
    )
    require(decay > 0, "schedule.decay", f"{decay} is not a length for a branch")
    return trunk.branch(at, decay, decay_shape=decay_shape, half_life=half_life, min_lr_ratio=min_lr_ratio)
