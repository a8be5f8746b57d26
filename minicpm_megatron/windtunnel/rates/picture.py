"""The learning-rate sweep as a picture, after figure 3."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_megatron.methods.rate_law import RateShift
from minicpm_megatron.storage.picture import (
    VALIDATION_LOSS,
    legend_beside,
    mark,
    offscreen_pyplot,
    save_picture,
    shades,
)

if TYPE_CHECKING:
    from minicpm_megatron.windtunnel.rates.sweep import Sweep

PICTURE = "rates.png"
_TITLES = {"mup": "muP", "standard": "standard parametrization"}


def draw_rates(sweeps: Sequence[Sweep], shifts: Mapping[str, RateShift | None], path: Path) -> Path:
    """One panel a parametrization: loss over learning rate, a colour a size, seeds as small marks, minima as stars."""
    pyplot = offscreen_pyplot()
    names = [name for name in _TITLES if any(sweep.parametrization == name for sweep in sweeps)]
    figure, axes = pyplot.subplots(1, len(names), figsize=(2.6 + 4.4 * len(names), 4.2), sharey=True, squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        group = [sweep for sweep in sweeps if sweep.parametrization == name]
        for sweep, colour in zip(group, shades(len(group)), strict=True):
            _draw_sweep(axis, sweep, colour)
        shift = shifts[name]
        moved = "" if shift is None else f"\ntwice the parameters: best learning rate times {2**shift.slope:.2f}"
        axis.set_title(_TITLES[name] + moved)
        axis.set_xscale("log", base=2)
        rates = group[0].rates
        axis.set_xticks(rates, [f"{rate:.3g}" for rate in rates], fontsize=8)
        axis.set_xlabel("base learning rate")
    # both panels have the same sizes in the same colours
    handles = axes[0][-1].get_legend_handles_labels()[0]
    if any(len(sweep.losses) > 1 for sweep in sweeps):
        handles.append(mark("one seed", linestyle="", marker=".", markersize=3, alpha=0.5))
    if any(sweep.optimum is not None for sweep in sweeps):
        handles.append(mark("parabola near the minimum", linestyle="--", linewidth=0.8))
        handles.append(mark("its minimum", linestyle="", marker="*", markersize=11))
    legend_beside(axes[0][-1], handles=handles, title="width x layers")
    axes[0][0].set_ylabel(VALIDATION_LOSS)
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
