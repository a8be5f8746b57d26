"""Decay shapes: how the learning rate falls in the decay stage (section 4.2 of arXiv 2404.06395).

This is the one file to change to add a shape of ours: a function below `decay_shape("name", ...)`. The decorator says
what else there is to know of it, so that no other file lists shapes by name. Another package declares a `DecayShape` in
the entry-point group `minicpm_megatron.decay_shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.registry import DECAY_SHAPES

FLOOR = 0.1  # appendix B.1: Cosine ends at 0.1 of the rate; the authors' posted WSD code decays to 10 % as well


@dataclass(frozen=True)
class DecaySettings:
    """What a decay shape may use besides the progress: d and H in the schedule's unit, and the floor in [0, 1)."""

    length: float
    half_life: float | None
    min_lr_ratio: float


@dataclass(frozen=True)
class DecayShape:
    """A curve, and what a recipe must know to use it.

    Attributes:
        function: f(r, settings) for progress r in (0, 1]: never rising, 0 <= f <= 1, and towards 1 for r towards 0.
        uses_half_life: f reads `settings.half_life`. A recipe gives `schedule.half_life` to such a shape, and to no
            other.
        default_floor: floor m where the recipe leaves `schedule.min_lr_ratio` null.
    """

    function: Callable[[float, DecaySettings], float]
    uses_half_life: bool = False
    default_floor: float = FLOOR

    def __call__(self, progress: float, settings: DecaySettings) -> float:
        """f(progress, settings)."""
        return self.function(progress, settings)


def as_decay_shape(entry: Any) -> DecayShape:
    """`entry` if it is a DecayShape; a plain function becomes a shape without a half-life whose floor is `FLOOR`.

    Raises:
        TypeError: it is neither.
    """
    if isinstance(entry, DecayShape):
        return entry
    if not callable(entry) or isinstance(entry, type):
        raise TypeError(f"a decay shape must be a DecayShape or a function, not {entry!r}")
    return DecayShape(entry)


def decay_settings(
    shape: str, *, length: float, half_life: float | None = None, min_lr_ratio: float | None = None
) -> DecaySettings:
    """The settings of a decay of the shape called `shape`, which must be one.

    Args:
        length, half_life: d and H, in the schedule's unit; a length of 0 is a trunk that only branches.
        min_lr_ratio: floor; None is the shape's own.

    Raises:
        UserError: an unknown shape, a half-life that is missing or that the shape ignores, or a curve that fails, rises
            or leaves [0, 1], since a run under it would end at a learning rate that nobody asked for.
    """
    DECAY_SHAPES.check(shape, where="schedule.decay_shape")
    curve: DecayShape = DECAY_SHAPES.get(shape)
    settings = DecaySettings(length, half_life, curve.default_floor if min_lr_ratio is None else min_lr_ratio)
    if not length:
        return settings
    if curve.uses_half_life:
        require(half_life is not None, "schedule.half_life", f"{shape} decay needs its half-life", "give it")
    else:
        ignored = f"{half_life} is given but {shape} decay has no use for it"
        require(half_life is None, "schedule.half_life", ignored, "leave it out")
    before = 1.0
    for step in range(1, 101):
        try:
            value = curve(step / 100, settings)
        except (TypeError, ValueError, ArithmeticError) as error:
            what = f"{shape!r} fails at progress {step / 100}: {type(error).__name__}: {error}"
            raise UserError(what, where="schedule.decay_shape") from error
        if not isinstance(value, (int, float)) or not 0 <= value <= before:
            what = f"{shape!r} is {value!r} at progress {step / 100}, which is not between 0 and {before}"
            raise UserError(what, where="schedule.decay_shape")
        before = value
    return settings


def decay_shape(
    name: str, *, uses_half_life: bool = False, default_floor: float = FLOOR
) -> Callable[[Callable[[float, DecaySettings], float]], DecayShape]:
    """Register the function below as the decay shape `name`; the arguments are those of `DecayShape`."""
    return lambda function: DECAY_SHAPES.add(name, DecayShape(function, uses_half_life, default_floor))


def above_floor(curve: float, settings: DecaySettings) -> float:
    """m + (1 - m) x `curve`: a curve from 1 to 0 as one from 1 to the floor m."""
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * curve


@decay_shape("exponential", uses_half_life=True, default_floor=0.0)
def exponential(progress: float, settings: DecaySettings) -> float:
    """0.5^((s - T) / H), cut off at the floor: section 4.2's f with the half-life reading of section 6.2."""
    assert settings.half_life is not None  # `decay_settings` sees to it
    return max(settings.min_lr_ratio, math.pow(0.5, progress * settings.length / settings.half_life))


@decay_shape("linear")
def linear(progress: float, settings: DecaySettings) -> float:
    """1 - r above the floor; with the floor 0.1 the authors' posted code."""
    return above_floor(1 - progress, settings)


@decay_shape("cosine")
def cosine(progress: float, settings: DecaySettings) -> float:
    """(1 + cos(pi r)) / 2 above the floor."""
    return above_floor((1 + math.cos(math.pi * progress)) / 2, settings)


@decay_shape("1-sqrt")
def one_minus_sqrt(progress: float, settings: DecaySettings) -> float:
    """1 - sqrt(r) above the floor (arXiv 2405.18392)."""
    return above_floor(1 - math.sqrt(progress), settings)


@decay_shape("megatron-exponential")
def megatron_exponential(progress: float, settings: DecaySettings) -> float:
    """2 x 0.5^r - 1 above the floor: what Megatron-LM calls exponential; it has no half-life of its own."""
    return above_floor(2 * 0.5**progress - 1, settings)
