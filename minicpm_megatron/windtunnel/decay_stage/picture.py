"""The decay stage as pictures, after figures 7 and 8."""

from __future__ import annotations

import bisect
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minicpm_megatron.storage.picture import (
    COLOURS,
    DECAY_COLOUR,
    LEARNING_RATE,
    legend_below,
    legend_beside,
    mark,
    offscreen_pyplot,
    save_picture,
    whole_steps,
)
from minicpm_megatron.storage.picture import CONTROL as GREY
from minicpm_megatron.storage.picture import OURS as BLUE
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.report import WINDOW, smooth
from minicpm_megatron.windtunnel.decay_stage.series import Around, Values, finished_pairs
from minicpm_megatron.windtunnel.decay_stage.updates import BEFORE, CONTROL, DECAY, MatrixUpdate

if TYPE_CHECKING:
    from minicpm_megatron.windtunnel.experiment import Experiment

UPDATES, GRADIENTS = "updates.png", "gradients.png"
# figure 7's two: ours hold query, key and value, and gate and up in one matrix each
SHOWN = {"linear_fc1": COLOURS[1], "linear_qkv": BLUE}
LINES = {BEFORE: "-", DECAY: "-", CONTROL: ":"}


def draw_updates(experiment: Experiment, runs: Sequence[Around], updates: Sequence[MatrixUpdate], path: Path) -> Path:
    """Largest update of every matrix from checkpoint to checkpoint, first seed; below it the loss and the rate."""
    pyplot = offscreen_pyplot()
    first = runs[0]
    figure, (upper, middle, lower) = pyplot.subplots(3, 1, figsize=(10, 6.5), sharex=True, height_ratios=(4, 1.6, 1))
    mine = [each for each in updates if each.seed == first.seed]
    layers = sorted({_layer(each.matrix) for each in mine} - {-1})
    chosen = layers[len(layers) // 2] if layers else -1
    labelled: set[str] = set()
    for matrix, points in _curves(mine).items():
        colour = next((SHOWN[kind] for kind in SHOWN if kind in matrix and _layer(matrix) == chosen), None)
        for window, line in LINES.items():
            name = ".".join(matrix.split(".")[-2:-1]) + f", layer {chosen + 1}"
            label = name if colour and window == DECAY else None
            if colour is None and window == DECAY and "others" not in labelled:
                label = "other matrices (dotted: without decay)"
                labelled.add("others")
            if colour and window == CONTROL:
                label = f"{name}, without decay"
            upper.plot(
                *zip(*points[window], strict=True),
                color=colour or "#c8c8c8",
                linestyle=line,
                linewidth=1.8 if colour else 0.7,
                marker="o" if colour else None,
                markersize=3,
                label=label,
                zorder=3 if colour else 1,
            )
    upper.set_yscale("log")
    upper.set_ylabel("largest update of an element")
    upper.set_title("updates from one checkpoint to the next, each at the later one; shaded: the decay")
    legend_beside(upper)
    trunk, decay = finished_pairs(experiment)[0]
    start = int(first.before["step"][0])
    needs = ("loss", "lr")
    whole = [each for each in read_metrics(trunk.folder / METRICS, needs=needs) if each["step"] >= start]
    decayed = [each for each in whole if each["step"] <= first.leaves]
    decayed += read_metrics(decay.folder / METRICS, needs=needs)
    for records, begin, colour, line in ((whole, first.leaves, GREY, ":"), (decayed, start, BLUE, "-")):
        steps = [each["step"] for each in records]
        shown = slice(bisect.bisect_left(steps, begin), None)
        losses, rates = smooth([each["loss"] for each in records]), [each["lr"] for each in records]
        label = "without decay" if records is whole else "with decay"
        middle.plot(steps[shown], losses[shown], color=colour, linestyle=line, label=label)
        lower.plot(steps[shown], rates[shown], color=colour, linestyle=line)
    middle.set_ylabel("training loss\n(nats per token)")
    legend_beside(middle, title=f"mean of {WINDOW} steps")
    lower.set_ylabel(LEARNING_RATE)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("step")
    whole_steps(lower)
    for axis in (upper, middle, lower):
        _shade(axis, first)
    return save_picture(figure, path)


def _curves(updates: Sequence[MatrixUpdate]) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Matrix -> window -> (step, update); what follows the window before begins at its last point."""
    curves: dict[str, dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for each in sorted(updates, key=lambda each: each.last):
        curves[each.matrix][each.window].append((each.last, each.largest))
    for windows in curves.values():
        for window in (DECAY, CONTROL):
            windows[window].insert(0, windows[BEFORE][-1])
    return curves


def _layer(matrix: str) -> int:
    return next((int(part) for part in matrix.split(".") if part.isdecimal()), -1)


PANELS = (  # name in metrics.jsonl, title, scale, factor
    ("loss", "training loss (nats per token)", "linear", 1),
    ("max_gradient", "largest gradient of an element", "linear", 1),
    ("gradient_norm", "gradient norm", "linear", 1),
    ("gradient_cosine", "cosine of consecutive gradients", "linear", 1),
    ("lr", LEARNING_RATE, "linear", 1),
    ("second_derivative", "D2, second derivative along the update", "symlog", 1),
    ("first_derivative", "-D1, minus the first derivative", "symlog", -1),
    ("curvature", "curvature along the trajectory", "log", 1),
)


def draw_gradients(runs: Sequence[Around], path: Path) -> Path:
    """Figure 8's six panels, loss and rate: every step of the first seed, and the mean of the seeds, smoothed."""
    pyplot = offscreen_pyplot()
    from matplotlib.ticker import LogLocator

    figure, axes = pyplot.subplots(2, 4, figsize=(15, 6.4), sharex=True)
    first = runs[0]
    for axis, (name, title, scale, factor) in zip(axes.flat, PANELS, strict=True):
        past = [(run.before["step"], factor * run.before[name]) for run in runs]
        for window, colour, line in (("control", GREY, ":"), ("decay", BLUE, "-")):
            after = [(getattr(run, window)["step"], factor * getattr(run, window)[name]) for run in runs]
            if name != "lr":
                for at, values in (past[0], after[0]) if window == "decay" else (after[0],):
                    axis.plot(at, values, ".", markersize=2.5, color=colour, alpha=0.3, markeredgewidth=0)
            (before_at, before), (at, mean) = _mean(past), _mean(after)
            both = np.concatenate([before, mean])
            curve = both if name == "lr" else _smooth_log(both) if scale == "log" else np.array(smooth(list(both)))
            shown = 0 if window == "decay" else len(before)
            steps = np.concatenate([before_at, at])[shown:]
            axis.plot(steps, curve[shown:], color=colour, linewidth=1.6, linestyle=line)
        axis.set_title(title)
        if scale == "symlog":
            usual = float(np.nanmedian(np.abs(first.before[name]))) or 1.0
            threshold, most = 10 ** math.ceil(math.log10(usual)), max(map(abs, axis.get_ylim()))
            if most > 10 * threshold:  # within it a symmetric logarithm is linear, with hardly a tick
                axis.set_yscale("symlog", linthresh=threshold)
        elif scale == "log":
            axis.set_yscale(scale)
            axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.yaxis.set_minor_formatter("")
        if scale == "symlog" or name == "gradient_cosine":
            axis.axhline(0, color="#444444", linewidth=0.8)
        if name == "lr":
            axis.set_ylim(bottom=0)
        _shade(axis, first)
    for axis in axes[1]:
        axis.set_xlabel("step")
        whole_steps(axis)
    seeds = "1 seed" if len(runs) == 1 else f"{len(runs)} seeds"
    said = f"mean of {seeds} and {WINDOW} steps"
    dot = {"linestyle": "", "marker": ".", "markersize": 5, "alpha": 0.5}
    legend_below(
        figure,
        [
            mark(f"before and in the decay (shaded): {said}", color=BLUE),
            mark(f"without decay: {said}", color=GREY, linestyle=":"),
            mark("every step of the first seed, with decay", color=BLUE, **dot),
            mark("without", color=GREY, **dot),
        ],
    )
    return save_picture(figure, path)


def _mean(series: Sequence[tuple[Values, Values]]) -> tuple[Values, Values]:
    """(steps, values) averaged over the seeds where all of them have the step."""
    common = series[0][0]
    for steps, _ in series[1:]:
        common = np.intersect1d(common, steps)
    return common, np.mean([values[np.isin(steps, common)] for steps, values in series], axis=0)


def _smooth_log(values: Values) -> Values:
    """Smoothed as its logarithm, without what has none."""
    with np.errstate(invalid="ignore", divide="ignore"):
        logs = np.where(values > 0, np.log(values), np.nan)
    return np.asarray(np.exp(smooth(list(logs))))


def _shade(axis: Any, run: Around) -> None:
    axis.axvspan(run.leaves, run.end, color=DECAY_COLOUR, zorder=0)
