"""Continued training as a picture, after figure 6."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_megatron.methods.economics import training_flops
from minicpm_megatron.methods.loss_envelope import Envelope
from minicpm_megatron.methods.scaling_law import COMPUTE_UNIT
from minicpm_megatron.recipe import BatchPlan
from minicpm_megatron.storage.picture import (
    COLOURS,
    VALIDATION_LOSS,
    legend_beside,
    mark,
    offscreen_pyplot,
    save_picture,
)
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell

if TYPE_CHECKING:
    from minicpm_megatron.windtunnel.envelope.findings import Ends, Trade
    from minicpm_megatron.windtunnel.experiment import Experiment

PICTURE = "envelope.png"
_COLOURS = (COLOURS[2], COLOURS[3])  # the small and the large one, green and pink as in figure 6
_STYLES = {"power": "-", "exponential": ":"}
_BEYOND = 1.5  # of the last point, that the fits are drawn


def draw_envelope(
    experiment: Experiment, ends: Sequence[Ends], forms: Sequence[Envelope], trades: Sequence[Trade], path: Path
) -> Path:
    """Loss over C = 6 N D: stable stages and decays of the first seed, ends as means over the seeds, both fits."""
    figure, axis = offscreen_pyplot().subplots(figsize=(9.6, 4.8))
    cells = {cell.name: cell for cell in experiment.cells}
    for each, colour in zip(ends, _COLOURS, strict=False):
        first = [row[0] for row in each.cells]
        a_token = training_flops(each.parameters, 1)
        trunk = _curve(cells[str(first[0].trunk)])
        if trunk:
            tokens, losses = np.array(trunk).T
            axis.plot(
                a_token * tokens,
                losses,
                color=colour,
                alpha=0.35,
                linewidth=1,
                label=f"{each.name}, stable stage and decays, first seed",
            )
        for cell in first:
            leaves = BatchPlan(cell.recipe).tokens(cell.first_step)
            before, end = [point for point in trunk if point[0] <= leaves], _curve(cell)[-1:]
            if before and end:
                xs, ys = np.array([before[-1], *end]).T
                axis.plot(a_token * xs, ys, color=colour, alpha=0.35, linewidth=1)
        axis.plot(
            each.compute,
            each.mean,
            "o",
            markersize=5,
            color=colour,
            label=f"{each.name}, after its decay, mean of the seeds",
        )
    small = ends[0]
    for form in forms:
        xs = np.geomspace(small.compute[0], _BEYOND * small.compute[-1], 200)
        label = f"{small.name}, {form.form} fit: R² {form.r_squared:.4f}"
        axis.plot(xs, form.loss(xs / COMPUTE_UNIT), _STYLES[form.form], color="#1d3557", linewidth=1.1, label=label)
    for trade in trades:
        if not math.isnan(trade.needed):
            at = training_flops(small.parameters, trade.needed)
            whence = at / trade.ratio.estimate
            arrow = {"arrowstyle": "->", "color": "#555555", "linewidth": 1}
            axis.annotate("", xy=(at, trade.loss), xytext=(whence, trade.loss), arrowprops=arrow)
            told = f"{trade.ratio.estimate:.2g} x"
            middle = math.sqrt(at * whence)
            axis.annotate(
                told, (middle, trade.loss), xytext=(0, 4), textcoords="offset points", fontsize=8, ha="center"
            )
    arrows = [each for each in trades if not math.isnan(each.needed)]
    _frame(
        axis,
        ends,
        [mark(f"compute of {small.name} over {ends[1].name}\nfor the same loss", marker="$\u2190$", linestyle="")]
        * bool(arrows),
    )
    return save_picture(figure, path)


def _frame(axis: Any, ends: Sequence[Ends], more: list[Any]) -> None:
    """Legend, and axes around the decayed ends: how a run begins would press them together."""
    from matplotlib.ticker import LogLocator

    losses = np.concatenate([each.mean[each.whole] for each in ends])
    compute = np.concatenate([each.compute for each in ends])
    if len(losses):
        room = 0.12 * (losses.max() - losses.min() or 1.0)
        axis.set_ylim(losses.min() - room, losses.max() + 3 * room)
    axis.set_xlim(compute.min() / 1.3, compute.max() * _BEYOND * 1.1)
    axis.set(xscale="log", xlabel="training compute C = 6ND (FLOPs)", ylabel=VALIDATION_LOSS)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(lambda flops, _: f"{flops:.0e}".replace("e+", "e"))
    axis.minorticks_off()
    legend_beside(axis, handles=axis.get_legend_handles_labels()[0] + more, title="width x layers")


def _curve(cell: Cell) -> list[tuple[int, float]]:
    plan = BatchPlan(cell.recipe)
    return [(plan.tokens(step), loss) for step, loss in progress.evaluations(cell) if step]
