"""Batch sizes as pictures, after figures 1 and 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_megatron.methods.batch_size_bootstrap import BootstrappedBatchSize, Contour
from minicpm_megatron.methods.batch_size_law import PUBLISHED, BatchRun
from minicpm_megatron.methods.polynomial import fit_parabola
from minicpm_megatron.storage.picture import (
    OURS,
    VALIDATION_LOSS,
    legend_below,
    legend_beside,
    mark,
    offscreen_pyplot,
    save_picture,
    shades,
)
from minicpm_megatron.storage.picture import PAPER as _PAPER
from minicpm_megatron.training.metrics import human

CONTOURS, LAW = "contours.png", "law.png"


def draw_contours(
    names: Mapping[float, str], runs: Sequence[BatchRun], contours: Sequence[Contour], path: Path
) -> Path:
    """One panel a size: runs as columns of points in the colour of their loss, contours, parabolas and minima."""
    pyplot = offscreen_pyplot()
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(1, len(names), figsize=(1.4 + 4.0 * len(names), 4.7), sharey=True, squeeze=False)
    # contours set the scale: what lies above them is only how a run begins
    losses = [each.loss for each in contours] or [float(loss) for run in runs for loss in run.loss]
    norm = LogNorm(min(losses) * 0.98, max(losses) * 1.02)
    style: dict[str, Any] = {"cmap": "viridis", "norm": norm}
    drawn: Any = None
    for axis, (size, name) in zip(axes[0], sorted(names.items()), strict=True):
        for run in runs:
            if run.size == size:
                column = np.full_like(run.tokens, run.batch)
                drawn = axis.scatter(column, run.tokens, c=run.loss, s=9, alpha=0.7, linewidths=0, **style)
        own = [each for each in contours if each.size == size]
        for each in own:
            _draw_contour(axis, each, pyplot.cm.viridis(norm(each.loss)))
        minima = [each.minimum for each in own if each.minimum is not None]
        line = [(each.batch, each.tokens) for each in minima]
        if line:
            axis.plot(*zip(*line, strict=True), marker="*", markersize=9, color=_PAPER, linewidth=1.2)
        axis.set(xscale="log", yscale="log", xlabel="batch size (tokens)", title=f"{name}, N = {size:,.0f}")
        batches = sorted({run.batch for run in runs if run.size == size})
        axis.set_xticks(batches, [_short(batch) for batch in batches], fontsize=8)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda tokens, _: human(tokens).strip())
        axis.minorticks_off()
    axes[0][0].set_ylabel("tokens trained on")
    bar = figure.colorbar(drawn, ax=axes[0].tolist(), label=VALIDATION_LOSS, format="%.3g")
    bar.minorticks_off()
    ticks = np.geomspace(min(losses), max(losses), 5)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
    legend_below(
        figure,
        [
            mark("an evaluation", linestyle="", marker="o", markersize=3),
            mark(
                "a loss of which each run has a point, between two evaluations",
                linestyle="",
                marker="o",
                markersize=4.5,
                markeredgecolor="black",
            ),
            mark("parabola through the points of one loss", linestyle="--", linewidth=1),
            mark("its minimum: the best batch size", color=_PAPER, marker="*", markersize=9),
        ],
    )
    return save_picture(figure, path)


def _draw_contour(axis: Any, contour: Contour, colour: Any) -> None:
    axis.plot(contour.batch, contour.tokens, "o", markersize=4.5, color=colour, markeredgecolor="black")
    if contour.minimum is None:
        return
    parabola = fit_parabola(np.log(contour.batch), np.log(contour.tokens))
    xs = np.linspace(math.log(contour.batch.min()), math.log(contour.batch.max()), 100)
    axis.plot(np.exp(xs), [math.exp(parabola.at(x)) for x in xs], linestyle="--", linewidth=1, color=colour)


def draw_law(names: Mapping[float, str], law: BootstrappedBatchSize, path: Path) -> Path:
    """Minima of all sizes over their loss, with our line, its limits, and the paper's."""
    pyplot = offscreen_pyplot()
    from matplotlib.ticker import MaxNLocator

    figure, axis = pyplot.subplots(figsize=(8.6, 4.6))
    minima = law.fit.minima
    losses = np.geomspace(min(each.loss for each in minima) * 0.97, max(each.loss for each in minima) * 1.03, 60)
    limits = [law.predict_interval(float(loss)) for loss in losses]
    axis.fill_between(
        losses,
        [each.low for each in limits],
        [each.high for each in limits],
        color=OURS,
        alpha=0.15,
        linewidth=0,
        label="ours, 95 % limits",
    )
    found = law.fit.law
    axis.plot(
        losses, [found.predict(loss) for loss in losses], color=OURS, label=f"ours: {found.a:.2g} / L^{found.b:.2f}"
    )
    paper = f"paper (L on C4): {PUBLISHED.a:.3g} / L^{PUBLISHED.b:g}"
    axis.plot(losses, [PUBLISHED.predict(loss) for loss in losses], color=_PAPER, linestyle="--", label=paper)
    shown = sorted(size for size in names if any(each.size == size for each in minima))
    for size, colour in zip(shown, shades(len(shown)), strict=True):
        own = [each for each in minima if each.size == size]
        label = f"{names[size]}: minima"
        axis.plot([each.loss for each in own], [each.batch for each in own], "o", color=colour, label=label)
    ticks = [tick for tick in MaxNLocator(9).tick_values(losses[0], losses[-1]) if losses[0] <= tick <= losses[-1]]
    axis.set(xscale="log", yscale="log", xlabel=VALIDATION_LOSS, ylabel="best batch size (tokens)")
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.minorticks_off()
    legend_beside(axis)
    return save_picture(figure, path)


def _short(tokens: float) -> str:
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens / unit:g}{name}"
    return f"{tokens:g}"
