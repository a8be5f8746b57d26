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
from minicpm_megatron.storage.picture import offscreen_pyplot, save_picture

CONTOURS, LAW = "contours.png", "law.png"
_RED = "#d62828"


def draw_contours(
    names: Mapping[float, str], runs: Sequence[BatchRun], contours: Sequence[Contour], path: Path
) -> Path:
    """One panel a size: runs as columns of points in the colour of their loss, contours, parabolas and minima."""
    pyplot = offscreen_pyplot()
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(
        1, len(names), figsize=(1.4 + 4.0 * len(names), 4.4), sharey=True, squeeze=False, layout="constrained"
    )
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
            axis.plot(*zip(*line, strict=True), marker="*", markersize=9, color=_RED, linewidth=1.2, label="minima")
            axis.legend(fontsize=8, loc="lower right")
        axis.set(xscale="log", yscale="log", xlabel="batch size (tokens)", title=f"{name}, N = {size:,.0f}")
        axis.title.set_fontsize(10)
        batches = sorted({run.batch for run in runs if run.size == size})
        axis.set_xticks(batches, [_short(batch) for batch in batches], fontsize=8)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(lambda tokens, _: f"{tokens:.3g}")
        axis.minorticks_off()
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("tokens trained on")
    bar = figure.colorbar(drawn, ax=axes[0].tolist(), label="held-out loss (nats per token)", format="%.3g")
    bar.minorticks_off()
    ticks = np.geomspace(min(losses), max(losses), 5)
    bar.set_ticks(ticks, labels=[f"{tick:.3g}" for tick in ticks])
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
    figure, axis = pyplot.subplots(figsize=(6.6, 4.6), layout="constrained")
    minima = law.fit.minima
    losses = np.geomspace(min(each.loss for each in minima) * 0.97, max(each.loss for each in minima) * 1.03, 60)
    limits = [law.predict_interval(float(loss)) for loss in losses]
    axis.fill_between(
        losses, [each.low for each in limits], [each.high for each in limits], color=_RED, alpha=0.12, linewidth=0
    )
    found = law.fit.law
    axis.plot(
        losses, [found.predict(loss) for loss in losses], color=_RED, label=f"ours: {found.a:.2g} / L^{found.b:.2f}"
    )
    paper = f"paper, L on C4: {PUBLISHED.a:.3g} / L^{PUBLISHED.b:g}"
    axis.plot(losses, [PUBLISHED.predict(loss) for loss in losses], color="#555555", linestyle="--", label=paper)
    shown = sorted(size for size in names if any(each.size == size for each in minima))
    for place, size in enumerate(shown):
        own = [each for each in minima if each.size == size]
        colour = pyplot.cm.viridis(0.85 * place / max(1, len(shown) - 1))
        axis.plot([each.loss for each in own], [each.batch for each in own], "o", color=colour, label=names[size])
    ticks = np.geomspace(losses[0], losses[-1], 6)
    axis.set(xscale="log", yscale="log", xlabel="held-out loss (nats per token)", ylabel="best batch size (tokens)")
    axis.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
    axis.minorticks_off()
    axis.invert_xaxis()
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
    return save_picture(figure, path)


def _short(tokens: float) -> str:
    for unit, name in ((2**20, "M"), (2**10, "K")):
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens / unit:g}{name}"
    return f"{tokens:g}"
