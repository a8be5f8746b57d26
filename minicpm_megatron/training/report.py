"""The end of a run for people: a loss curve as a picture and what is where."""

from __future__ import annotations

import bisect
import contextlib
import itertools
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.checkpoint.names import published_steps, step_folder
from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.data.statistics import blend_entropy
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import BatchPlan, Recipe
from minicpm_megatron.storage.manifest import MANIFEST, read_manifest
from minicpm_megatron.storage.picture import (
    COLOURS,
    CONTROL,
    DECAY_COLOUR,
    LEARNING_RATE,
    OURS,
    legend_beside,
    offscreen_pyplot,
    save_picture,
    whole_steps,
)
from minicpm_megatron.training.expert_picture import PICTURE as EXPERT_PICTURE
from minicpm_megatron.training.expert_picture import finish_experts
from minicpm_megatron.training.metrics import METRICS, read_metrics

PICTURE = "loss.png"
WINDOW = 15  # steps that a smoothed curve averages
_EVERY_STEP = "#a9c8de"


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
        print(f"{folder / METRICS} has no step to sum up")
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
    """What the decay stage did to every validation set that was evaluated at its start, as "name before -> after"."""
    start = _decay_start(recipe)
    effect = []
    if start is not None:
        for name, points in sorted(_evaluations(folder).items()):
            before = [loss for step, loss in points if step == start]
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
    """Loss and learning rate over steps, the decay stage shaded, a branch after its trunk; into the run's folder."""
    pyplot = offscreen_pyplot()
    train = _updates(folder)
    steps = [record["step"] for record in train]
    losses = [record["loss"] for record in train]
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 5.5), sharex=True, height_ratios=(4, 1))
    upper.plot(steps, losses, color=_EVERY_STEP, linewidth=0.8, label="training, every step")
    upper.plot(steps, smooth(losses), color=OURS, linewidth=1.8, label=f"training, mean of up to {WINDOW} steps")
    sets = dict(zip(sorted(_evaluations(folder)), itertools.cycle(COLOURS[1:6]), strict=False))
    for name, points in sorted(_evaluations(folder).items()):
        upper.plot(*zip(*points, strict=True), marker="o", markersize=3, color=sets[name], label=f"validation: {name}")
    trunk = trunk_of(folder, steps[0])
    if trunk is not None:
        _draw_trunk(upper, lower, trunk, steps, sets)
    upper.axhline(entropy, color=CONTROL, linestyle="--", linewidth=1, label="unigram entropy of the data")
    decay_start = _decay_start(recipe)
    if decay_start is not None and decay_start < steps[-1]:
        upper.axvspan(decay_start, steps[-1], color=DECAY_COLOUR, zorder=0, label="decay")
        lower.axvspan(decay_start, steps[-1], color=DECAY_COLOUR, zorder=0)
    _mark_growth(upper, recipe, steps[0], steps[-1])
    upper.set_ylabel("loss (nats per token)")
    upper.set_title(f"{recipe.name}: {recipe.preset or 'a model of its own shape'}")
    legend_beside(upper)
    lower.plot(steps, [record["lr"] for record in train], color=OURS)
    lower.set_ylabel(LEARNING_RATE)
    lower.set_xlabel("step")
    lower.set_ylim(bottom=0)
    whole_steps(lower)
    return save_picture(figure, folder / PICTURE)


def _mark_growth(axis: Any, recipe: Recipe, first: int, last: int) -> None:
    """Mark the steps at which the batch grows: there the loss drops, as figure 12 shows for 1.2B."""
    phases = BatchPlan(recipe).phases
    for before, phase in itertools.pairwise(phases):
        if first <= phase.first_step <= last:
            axis.axvline(phase.first_step, color=CONTROL, linewidth=0.8, linestyle=":")
            told = f" batch {before.global_batch_size} to {phase.global_batch_size} samples"
            axis.text(phase.first_step, 0.98, told, transform=axis.get_xaxis_transform(), va="top", fontsize=8)


def trunk_of(folder: Path, first_step: int) -> Path | None:
    """The run that the run in `folder` branched from before `first_step`; None where there is none, or it is gone."""
    saves = folder / CHECKPOINTS
    for step in reversed(published_steps(saves)):
        folder = step_folder(saves, step)
        try:
            parent = RunState.of(read_manifest(folder), str(folder / MANIFEST)).parent
        except UserError:
            continue
        # a new stage begins with another run's weights, too, but at step 0
        branched = parent is not None and parent.step == first_step - 1 > 0
        return parent.run if parent and branched and (parent.run / METRICS).is_file() else None
    return None


def _draw_trunk(upper: Any, lower: Any, trunk: Path, steps: list[int], sets: dict[str, str]) -> None:
    """The end of the trunk's stable stage before the branch, up to four times as long as the branch."""
    first = steps[0] - 4 * len(steps)
    before = [record for record in _updates(trunk) if first <= record["step"] < steps[0]]
    if not before:
        return
    at = [record["step"] for record in before]
    label = f"before, in {trunk.name}: mean of {WINDOW} steps"
    upper.plot(at, smooth([record["loss"] for record in before]), color=CONTROL, label=label)
    for each, points in sorted(_evaluations(trunk).items()):
        earlier = [point for point in points if first <= point[0] < steps[0]]
        if earlier and each in sets:
            upper.plot(*zip(*earlier, strict=True), marker="o", markersize=3, linestyle=":", color=sets[each])
    upper.plot([], [], marker="o", markersize=3, linestyle=":", color=CONTROL, label=f"validation, in {trunk.name}")
    lower.plot(at, [record["lr"] for record in before], color=CONTROL)


def smooth(values: list[float], window: int = WINDOW) -> list[float]:
    """Moving average over the `window` values around each; nan stays out.

    At the beginning the window shrinks on both sides alike, down to the first value itself: whole on its right, it
    would begin a falling curve far below its first values. At the end it has what there is.
    """
    result = []
    for index in range(len(values)):
        reach = min(window // 2, index)
        near = [value for value in values[index - reach : index + reach + 1] if math.isfinite(value)]
        result.append(sum(near) / len(near) if near else math.nan)
    return result


def _decay_start(recipe: Recipe) -> int | None:
    """The step at which the decay that ends the run begins, or None where there is none."""
    start, plan = build_schedule(recipe).decay_start, BatchPlan(recipe)
    if start is None:
        return None
    return bisect.bisect_right(range(plan.total_steps()), start, key=plan.position)
