"""A search as a picture: the loss of every trial in their order, and over each of the values."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_megatron.storage.picture import (
    COLOURS,
    VALIDATION_LOSS,
    legend_beside,
    mark,
    offscreen_pyplot,
    save_picture,
)
from minicpm_megatron.storage.picture import PAPER as _PAPER
from minicpm_megatron.windtunnel.search.space import AXES, Range

if TYPE_CHECKING:
    from minicpm_megatron.windtunnel.search.findings import Searched

PICTURE = "search.png"
_BEST = COLOURS[5]
_SHOWN = 0.75  # quantile of the losses that the scale is made for: the worst runs are far above all that matters


def draw_search(searched: Searched, ranges: Mapping[str, Range], path: Path) -> Path:
    """Above, loss over trial with the best so far; below, loss over each value, later trials darker.

    What lies above the picture, or diverged, is a triangle at its upper edge.
    """
    pyplot = offscreen_pyplot()
    figure = pyplot.figure(figsize=(13, 7))
    grid = figure.add_gridspec(2, len(AXES), height_ratios=(1, 1.1))
    above = figure.add_subplot(grid[0, :])
    low, high = _scale(searched)
    _draw_order(above, searched, high)
    first = None
    for column, axis in enumerate(AXES):
        panel = figure.add_subplot(grid[1, column], sharey=first)
        first = first or panel
        _draw(panel, searched, [each.values[axis.name] for each in searched.results], high)
        panel.axvline(axis.paper, color=_PAPER, linewidth=0.8, linestyle="--")
        panel.set_xscale("log")
        ends = ranges[axis.name]
        panel.set_xlim(ends[0] / 1.1, ends[1] * 1.1)
        ticks = [ends[0], axis.paper, ends[1]]
        panel.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=8)
        panel.minorticks_off()
        share = "" if searched.importances is None else f": importance {searched.importances.shares[column]:.0%}"
        panel.set_title(share.removeprefix(": ").capitalize())
        panel.set_xlabel(axis.key)
        panel.tick_params(labelleft=column == 0)
    for panel in figure.axes:
        panel.set_ylim(low, high)
    for panel in (above, figure.axes[1]):
        panel.set_ylabel(VALIDATION_LOSS, fontsize=9)
    return save_picture(figure, path)


def _draw_order(panel: Any, searched: Searched, high: float) -> None:
    _draw(panel, searched, [each.number for each in searched.results], high)
    known = [math.inf if math.isnan(each.loss) else each.loss for each in searched.results]
    so_far = np.minimum.accumulate(known)
    panel.step(range(len(so_far)), so_far, where="post", color="black", linewidth=0.9, label="best so far")
    if math.isfinite(searched.paper.loss):
        panel.axhline(searched.paper.loss, color=_PAPER, linewidth=0.8, linestyle="--")
    panel.set_xlabel("trial")
    panel.xaxis.get_major_locator().set_params(integer=True)
    handles = panel.get_legend_handles_labels()[0]
    dot = {"linestyle": "", "marker": "o", "markersize": 5}
    handles += [
        mark("an early trial", color=_shade(0), **dot),
        mark("a late trial", color=_shade(1), **dot),
        mark("above the picture, or diverged", linestyle="", marker="^", markersize=5),
        mark("the paper's values, and their loss", color=_PAPER, linestyle="--", linewidth=0.8),
    ]
    legend_beside(panel, handles=handles)


def _draw(panel: Any, searched: Searched, places: list[float], high: float) -> None:
    """All trials, then the paper's and the best of the others over them."""
    marked = {0: ("D", 40, _PAPER, "the paper's set"), searched.best: ("*", 150, _BEST, "best of the others")}
    for result, place in zip(searched.results, places, strict=True):
        if math.isnan(result.loss):
            continue
        outside = not result.loss < high
        shade = _shade(result.number / len(searched.results))
        shape, size, colour, label = marked.get(result.number, ("o", 22, shade, None))
        panel.scatter(
            [place],
            [high if outside else result.loss],
            marker="^" if outside else shape,
            s=size,
            color=colour,
            label=label,
            clip_on=False,
            zorder=4 if label else 3,
        )


def _shade(place: float) -> str:
    """The grey of a trial at `place` of the search, from 0 for the first to 1 for the last."""
    return str(0.75 - 0.6 * place)


def _scale(searched: Searched) -> tuple[float, float]:
    """The best loss to the paper's or that of most trials, with some room."""
    losses = [each.loss for each in searched.results if math.isfinite(each.loss)] or [0.0]
    low, most = min(losses), float(np.quantile(losses, _SHOWN, method="lower"))
    high = max([most, *([searched.paper.loss] if math.isfinite(searched.paper.loss) else [])])
    room = 0.06 * (high - low) or 0.1
    return low - room, high + room
