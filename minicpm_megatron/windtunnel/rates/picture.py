"""The learning-rate sweep as a picture, after figure 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_megatron.methods.rate_law import RateShift
from minicpm_megatron.storage.picture import offscreen_pyplot, save_picture

if TYPE_CHECKING:
    from minicpm_megatron.windtunnel.rates.sweep import Sweep

PICTURE = "rates.png"
_TITLES = {"mup": "muP", "standard": "standard parametrisation"}


def draw_rates(sweeps: Sequence[Sweep], shifts: Mapping[str, RateShift | None], path: Path) -> Path:
    """One panel a parametrisation: loss over rate, a colour a size, seeds as small marks, minima as stars."""
    pyplot = offscreen_pyplot()
    names = [name for name in _TITLES if any(sweep.parametrization == name for sweep in sweeps)]
    figure, axes = pyplot.subplots(
        1, len(names), figsize=(1.2 + 4.4 * len(names), 4.2), sharey=True, squeeze=False, layout="constrained"
    )
    for axis, name in zip(axes[0], names, strict=True):
        group = [sweep for sweep in sweeps if sweep.parametrization == name]
        for number, sweep in enumerate(group):
            _draw_sweep(axis, sweep, pyplot.cm.viridis(0.85 * number / max(1, len(group) - 1)))
        shift = shifts[name]
        moved = "" if shift is None else f"\nbest rate: {shift.slope:+.2f} octaves an octave of N"
        axis.set_title(_TITLES[name] + moved, fontsize=10)
        axis.set_xscale("log", base=2)
        rates = group[0].rates
        axis.set_xticks(rates, [f"{rate:.3g}" for rate in rates], fontsize=8)
        axis.set_xlabel("base learning rate")
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, fontsize=8, title="width x layers", title_fontsize=8)
    axes[0][0].set_ylabel("held-out loss (nats per token)")
    return save_picture(figure, path)


def _draw_sweep(axis: Any, sweep: Sweep, colour: Any) -> None:
    means = sweep.losses.mean(axis=0)
    axis.plot(sweep.rates, means, marker="o", markersize=4, linewidth=1, color=colour, label=sweep.size)
    if len(sweep.losses) > 1:
        for row in sweep.losses:
            axis.plot(sweep.rates, row, linestyle="", marker=".", markersize=3, color=colour, alpha=0.5)
    if sweep.optimum is None:
        return
    xs = np.linspace(math.log2(sweep.rates[0]), math.log2(sweep.rates[-1]), 200)
    near = [x for x in xs if abs(x - math.log2(sweep.optimum.rate)) < 2.5]
    axis.plot(
        [2**x for x in near],
        [sweep.optimum.parabola.at(x) for x in near],
        linestyle="--",
        linewidth=0.8,
        color=colour,
    )
    axis.plot([sweep.optimum.rate], [sweep.optimum.loss], marker="*", markersize=11, color=colour)
