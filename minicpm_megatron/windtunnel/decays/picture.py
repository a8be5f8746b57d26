"""Decays and cosines as pictures, after figures 4 and 5. Curves are means over the seeds of the held-out loss."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_megatron.recipe import BatchPlan
from minicpm_megatron.storage.picture import (
    COLOURS,
    CONTROL,
    VALIDATION_LOSS,
    legend_beside,
    offscreen_pyplot,
    save_picture,
    shades,
)
from minicpm_megatron.training.metrics import human
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell

if TYPE_CHECKING:
    from minicpm_megatron.windtunnel.decays.findings import Comparison
    from minicpm_megatron.windtunnel.experiment import Experiment

COSINES, DECAYS = "cosines.png", "decays.png"
_COSINE = COLOURS[1]
Curve = list[tuple[int, float]]
"""(tokens since the start of training, loss)."""


def draw_cosines(experiment: Experiment, path: Path) -> Path:
    """Loss over tokens of every Cosine(T) and CosineLoop(T), and of the trunk."""
    pyplot = offscreen_pyplot()
    figure, axis = pyplot.subplots(figsize=(8.5, 4.2))
    _plot(axis, mean_curve(experiment, {"role": "trunk"}), label="constant learning rate", color=CONTROL)
    periods = sorted({cell.labels["period"] for cell in experiment.cells if "period" in cell.labels})
    for period, colour in zip(periods, shades(len(periods)), strict=True):
        for role, name, line in (("cosine", "Cosine", "-"), ("cosine_loop", "CosineLoop", "--")):
            curve = mean_curve(experiment, {"role": role, "period": period})
            _plot(axis, curve, label=f"{name}(T = {_times(period)}S)", color=colour, linestyle=line)
    _finish(axis, f"cosines that reach their minimum after T tokens; S = {_length(experiment, 1)}")
    return save_picture(figure, path)


def draw_decays(experiment: Experiment, comparisons: Sequence[Comparison], path: Path) -> Path:
    """Left: the trunk, its branches of the first shape and cosines over tokens. Right: final loss over the share."""
    pyplot = offscreen_pyplot()
    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(14, 4.2))
    shapes = experiment.settings["shapes"]
    trunk = mean_curve(experiment, {"role": "trunk"})
    _plot(curves, trunk, label="stable stage", color=CONTROL)
    shares = sorted(experiment.settings["shares"])
    for share, colour in zip(shares, shades(len(shares)), strict=True):
        for each in comparisons:
            labels = {"role": "wsd", "end": each.end, "share": share, "shape": shapes[0]}
            branch = mean_curve(experiment, labels)
            before = [point for point in trunk if branch and point[0] <= _leaves_at(experiment, labels)]
            label = f"WSD, {100 * share:.3g} % decay" if each is comparisons[0] else None
            _plot(curves, [*before[-1:], *branch], label=label, color=colour)
    for each, line in zip(comparisons, itertools.cycle((":", "--", "-.")), strict=False):
        curve = mean_curve(experiment, {"role": "cosine", "period": each.end})
        label = f"Cosine(T = {_length(experiment, each.end)})"
        _plot(curves, curve, label=label, color=_COSINE, linestyle=line)
    _finish(curves, f"{shapes[0]} decays that leave one stable stage")
    whole, longest = comparisons[0], _length(experiment, comparisons[0].end)
    for shape, colour in zip(shapes, itertools.cycle((COLOURS[0], *COLOURS[2:6])), strict=False):
        losses = [whole.mean(("wsd", share, shape)) for share in shares]
        ends.plot([100 * share for share in shares], losses, marker="o", color=colour, label=f"WSD, {shape} decay")
    cosine = whole.mean(("cosine", whole.end, ""))
    ends.axhline(cosine, color=_COSINE, linestyle=":", label=f"Cosine(T = {longest})")
    ends.set_xticks([100 * share for share in shares], [f"{100 * share:.3g}" for share in shares])
    ends.set_xlabel("share of the tokens that is decay (%)")
    ends.set_ylabel(VALIDATION_LOSS)
    ends.set_title(f"after {longest}")
    legend_beside(ends)
    return save_picture(figure, path)


def mean_curve(experiment: Experiment, labels: dict[str, Any]) -> Curve:
    """The evaluations of the cells with these labels, averaged where all of them have one."""
    cells = [cell for cell in experiment.cells if labels.items() <= dict(cell.labels).items()]
    if not cells:
        return []
    by_step = [dict(progress.evaluations(cell)) for cell in cells]
    plan = BatchPlan(cells[0].recipe)
    common = sorted(set.intersection(*(set(each) for each in by_step)))
    return [(plan.tokens(step), sum(each[step] for each in by_step) / len(by_step)) for step in common]


def _length(experiment: Experiment, share: float) -> str:
    """`share` of S, the recipe's length, in tokens."""
    plan = BatchPlan(experiment.base)
    return f"{human(share * plan.tokens(plan.total_steps())).strip()} tokens"


def _times(share: float) -> str:
    return "" if share == 1 else f"{share:g} "


def _leaves_at(experiment: Experiment, labels: dict[str, Any]) -> int:
    cell: Cell = next(cell for cell in experiment.cells if labels.items() <= dict(cell.labels).items())
    return BatchPlan(cell.recipe).tokens(cell.first_step)


def _plot(axis: Any, curve: Curve, **style: Any) -> None:
    if curve:
        axis.plot(*zip(*curve, strict=True), marker=".", **style)


def _finish(axis: Any, title: str) -> None:
    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(lambda value, _: human(value).strip())
    axis.set_ylabel(VALIDATION_LOSS)
    axis.set_title(title)
    legend_beside(axis)
