"""Notes at the start of a run: settings that are legal and seldom meant."""

from __future__ import annotations

import math

from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import ScheduleRecipe

# section 4.3's decays end at a tenth of the learning rate or below, and what is gained is gained by getting there
LOW_ENOUGH = 0.1


def schedule_note(schedule: ScheduleRecipe) -> str | None:
    """Say that an exponential decay ends at a tenth of the learning rate or above, and what would take it lower.

    None where it does not, or where `min_lr_ratio` asks for it.
    """
    decay, half_life = schedule.decay, schedule.half_life
    if schedule.shape != "wsd" or schedule.decay_shape != "exponential" or not decay or half_life is None:
        return None
    end = build_schedule(schedule).end_factor
    if end < LOW_ENOUGH or (schedule.min_lr_ratio or 0.0) >= LOW_ENOUGH:
        return None
    return (
        f"note: the decay ends at {end:.3g} of the learning rate: {decay:,} {schedule.unit} are"
        f" {decay / half_life:.2g} half-lives of {half_life:,g}; below a tenth:"
        f" schedule.half_life={decay / 5:g} (5 half-lives), or schedule.decay={math.ceil(5 * half_life)}"
    )
