"""The end of a run for people: a loss curve as a picture and what is where."""

from __future__ import annotations

import bisect
import contextlib
import math
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from minicpm_megatron.data.statistics import blend_entropy
from minicpm_megatron.methods.schedules import WSD, build_schedule
from minicpm_megatron.recipe import BatchPlan, Recipe
from minicpm_megatron.storage.picture import offscreen_pyplot, save_picture
from minicpm_megatron.training.expert_picture import PICTURE as EXPERT_PICTURE
from minicpm_megatron.training.expert_picture import finish_experts
from minicpm_megatron.training.metrics import METRICS, read_metrics

PICTURE = "loss.png"
DECAY_COLOUR = "#e8eef7"


def finish(folder: Path, recipe: Recipe) -> None:
    """Draw the loss curve of a run and print where its results are.

    The last checkpoint is whole by now. So what goes wrong here is said in a line, and the run has not failed.
    """
    with best_effort(f"{folder / PICTURE} could not be drawn"):
        if _updates(folder):
            draw_loss(folder, recipe, _entropy(recipe))
    with best_effort(f"{folder / EXPERT_PICTURE} could not be drawn"):
        finish_experts(folder)
    with best_effort("the results could not be summed up"):
        _sum_up(folder, recipe)


@contextlib.contextmanager
def best_effort(what: str) -> Iterator[None]:
    """Print any error of the block on standard error, as a line that begins with `what`, instead of raising it."""
    try:
        yield
    except Exception as error:
        reason = " ".join(f"{type(error).__name__} {error}".split())
        print(f"note: the run is finished and saved, but {what} ({reason})", file=sys.stderr, flush=True)


def _entropy(recipe: Recipe) -> float:
    return blend_entropy([(source.prefix, source.weight) for source in recipe.data.train])


def _sum_up(folder: Path, recipe: Recipe) -> None:
    records = _updates(folder)
    if not records:
        return
    entropy = _entropy(recipe)
    last = [record["loss"] for record in records[-10:]]
    loss = sum(last) / len(last)
    print(
        f"loss {loss:.3f} nats per token over the last {len(last)} steps; unigram entropy of the training data "
        f"{entropy:.3f} (a model that ignores context cannot do better)"
    )
    effect = decay_effect(folder, recipe)
    if effect:
        print("held-out loss over the decay stage, nats per token: " + ", ".join(effect))
    print(f"metrics: {folder / METRICS}, picture: {folder / PICTURE}, TensorBoard: tensorboard --logdir {folder}")


def _updates(folder: Path) -> list[dict[str, Any]]:
    """The metrics of the steps that were not skipped."""
    records = read_metrics(folder / METRICS, needs=("loss", "lr"))
    return [record for record in records if not record.get("skipped") and record["loss"] is not None]


def decay_effect(folder: Path, recipe: Recipe) -> list[str]:
    """What the decay stage did to every held-out set, as "name before -> after"."""
    start = _decay_start(recipe)
    effect = []
    if start is not None:
        for name, points in sorted(_evaluations(folder).items()):
            before = [loss for step, loss in points if step <= start]
            if before and points[-1][0] > start:
                effect.append(f"{name} {before[-1]:.3f} -> {points[-1][1]:.3f}")
    return effect


def _evaluations(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Held-out set -> (step, loss per token) in order."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(folder / METRICS, "evaluation", ("set", "loss_per_token")):
        found.setdefault(record["set"], []).append((record["step"], record["loss_per_token"]))
    return found


def draw_loss(folder: Path, recipe: Recipe, entropy: float) -> Path:
    """Loss and rate over steps, with the decay stage shaded; written to the run's folder."""
    pyplot = offscreen_pyplot()
    train = _updates(folder)
    steps = [record["step"] for record in train]
    losses = [record["loss"] for record in train]
    figure, (upper, lower) = pyplot.subplots(
        2, 1, figsize=(8, 5.5), sharex=True, height_ratios=(4, 1), layout="constrained"
    )
    upper.plot(steps, losses, color="#9db7d9", linewidth=0.8, label="training, every step")
    upper.plot(steps, smooth(losses), color="#1f4e8c", linewidth=1.8, label="training, smoothed")
    for name, points in sorted(_evaluations(folder).items()):
        upper.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=1, label=f"held out: {name}")
    upper.axhline(entropy, color="#777777", linestyle="--", linewidth=1, label="unigram entropy")
    decay_start = _decay_start(recipe)
    for axis in (upper, lower):
        if decay_start is not None:
            axis.axvspan(decay_start, max(steps[-1], decay_start), color=DECAY_COLOUR, zorder=0)
        axis.spines[["top", "right"]].set_visible(False)
    if decay_start is not None and decay_start < steps[-1]:
        upper.text(decay_start, upper.get_ylim()[1], " decay", va="top", fontsize=9, color="#1f4e8c")
    _mark_growth(upper, recipe, steps[0], steps[-1])
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(f"{recipe.name}: {recipe.preset or 'own shape'}")
    upper.legend(frameon=False, fontsize=8)
    lower.plot(steps, [record["lr"] for record in train], color="#1f4e8c", linewidth=1.5)
    lower.set_ylabel("rate")
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    return save_picture(figure, folder / PICTURE)


def _mark_growth(axis: Any, recipe: Recipe, first: int, last: int) -> None:
    """Mark the steps at which the batch grows: there the loss drops, as figure 12 shows for 1.2B."""
    phases = BatchPlan(recipe).phases
    for before, phase in pairwise(phases):
        if first <= phase.first_step <= last:
            axis.axvline(phase.first_step, color="#777777", linewidth=0.8, linestyle=":")
            told = f" batch {before.global_batch_size} to {phase.global_batch_size} samples"
            # below the word "decay", which may stand beside it
            axis.text(phase.first_step, 0.9, told, transform=axis.get_xaxis_transform(), va="top", fontsize=8)


def smooth(values: list[float], window: int = 15) -> list[float]:
    """Moving average over the `window` values around each, or at the ends over those there are; nan stays out."""
    result, reach = [], window // 2
    for index in range(len(values)):
        near = [value for value in values[max(0, index - reach) : index + reach + 1] if math.isfinite(value)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def _decay_start(recipe: Recipe) -> int | None:
    """The step at which the decay begins, or None where there is none."""
    schedule, plan = build_schedule(recipe.schedule), BatchPlan(recipe)
    if not isinstance(schedule, WSD) or not recipe.schedule.decay:
        return None
    return bisect.bisect_right(range(plan.total_steps()), schedule.stable_end, key=plan.position)
