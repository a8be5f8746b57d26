"""Decays and cosines as pictures, after figures 4 and 5. Curves are means over the seeds of the held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minicpm_megatron.recipe import BatchPlan
from minicpm_megatron.storage.picture import offscreen_pyplot, save_picture
from minicpm_megatron.training.metrics import human
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell

if TYPE_CHECKING:
    from minicpm_megatron.windtunnel.decays.findings import Comparison
    from minicpm_megatron.windtunnel.experiment import Experiment

COSINES, DECAYS = "cosines.png", "decays.png"
Curve = list[tuple[int, float]]
"""(tokens since the start of training, loss)."""


def draw_cosines(experiment: Experiment, path: Path) -> Path:
    """Loss over tokens of every Cosine(T) and CosineLoop(T), and of the trunk."""
    pyplot = offscreen_pyplot()
    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    _plot(axis, mean_curve(experiment, {"role": "trunk"}), label="constant rate", color="#888888")
    periods = sorted({cell.labels["period"] for cell in experiment.cells if "period" in cell.labels})
    for number, period in enumerate(periods):
        colour = pyplot.cm.viridis(0.9 * number / max(1, len(periods) - 1))
        for role, name, line in (("cosine", "Cosine", "-"), ("cosine_loop", "CosineLoop", "--")):
            curve = mean_curve(experiment, {"role": role, "period": period})
            _plot(axis, curve, label=f"{name}({period:g} S)", color=colour, linestyle=line)
    _finish(axis, "held-out loss under cosines of period T")
    return save_picture(figure, path)


def draw_decays(experiment: Experiment, comparisons: Sequence[Comparison], path: Path) -> Path:
    """Left: the trunk, its branches of the first shape and Cosine(E) over tokens. Right: final loss over the share."""
    pyplot = offscreen_pyplot()
    figure, (curves, ends) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    shapes = experiment.settings["shapes"]
    trunk = mean_curve(experiment, {"role": "trunk"})
    _plot(curves, trunk, label="stable stage", color="#444444")
    shares = sorted(experiment.settings["shares"])
    for number, share in enumerate(shares):
        colour = pyplot.cm.plasma(0.85 * number / max(1, len(shares) - 1))
        for each in comparisons:
            labels = {"role": "wsd", "end": each.end, "share": share, "shape": shapes[0]}
            branch = mean_curve(experiment, labels)
            before = [point for point in trunk if branch and point[0] <= _leaves_at(experiment, labels)]
            label = f"WSD, {100 * share:.3g} % decay" if each is comparisons[0] else None
            _plot(curves, [*before[-1:], *branch], label=label, color=colour)
    for each in comparisons:
        curve = mean_curve(experiment, {"role": "cosine", "period": each.end})
        label = "Cosine(T = S)" if each is comparisons[0] else None
        _plot(curves, [point for point in curve if curve], label=label, color="#2a9d8f", linestyle=":")
    _finish(curves, f"decays ({shapes[0]}) that leave one stable stage")
    for number, shape in enumerate(shapes):
        losses = [comparisons[0].mean(("wsd", share, shape)) for share in shares]
        ends.plot(shares, losses, marker="o", markersize=4, color=f"C{number}", label=shape)
    ends.axhline(comparisons[0].mean(("cosine", 1, "")), color="#2a9d8f", linestyle=":", label="Cosine(T = S)")
    ends.set_xlabel("share of the tokens that is decay")
    ends.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    ends.set_title("loss after S tokens", fontsize=10)
    ends.spines[["top", "right"]].set_visible(False)
    ends.legend(frameon=False, fontsize=8)
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


def _leaves_at(experiment: Experiment, labels: dict[str, Any]) -> int:
    cell: Cell = next(cell for cell in experiment.cells if labels.items() <= dict(cell.labels).items())
    return BatchPlan(cell.recipe).tokens(cell.first_step)


def _plot(axis: Any, curve: Curve, **style: Any) -> None:
    if curve:
        axis.plot(*zip(*curve, strict=True), marker=".", markersize=3, linewidth=1.2, **style)


def _finish(axis: Any, title: str) -> None:
    axis.set_xlabel("tokens")
    axis.xaxis.set_major_formatter(lambda value, _: human(value).strip())
    axis.set_ylabel("held-out loss (nats per token)")
    axis.set_title(title, fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=8)
