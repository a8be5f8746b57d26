"""A decay shape is a function of the progress r in (0, 1] and the decay's settings, in a DecayShape that describes it.

It must fall from 1 (for r towards 0) without ever rising, and stay within 0 and 1.
"""

from __future__ import annotations

from minicpm_megatron.methods.decay_shapes import DecaySettings, DecayShape


def one_minus_square(progress: float, settings: DecaySettings) -> float:
    """1 - r^2 above the floor: slow first, fast at the end."""
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * (1 - progress**2)


square = DecayShape(one_minus_square, uses_half_life=False, default_floor=0.1)
