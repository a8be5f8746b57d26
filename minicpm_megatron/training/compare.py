"""Runs side by side: what each has cost since it began, in tokens and FLOPs, and what it is worth on held-out text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import BatchPlan, Recipe, count_parameters, load_recipe
from minicpm_megatron.recipe.dump import RECIPE
from minicpm_megatron.recipe.flops import flops_per_token, run_flops
from minicpm_megatron.storage.picture import VALIDATION_LOSS, legend_beside, offscreen_pyplot, save_picture
from minicpm_megatron.training.metrics import METRICS, human, read_metrics
from minicpm_megatron.training.text import aligned

_LAST = 10  # steps whose losses are averaged
_NAMED = 4  # sets that a mean is named by


@dataclass(frozen=True)
class RunCurve:
    """A run's own steps, those before a branch or an upcycling left out.

    Attributes:
        name: of the run's folder; a run that was moved may have another one in its recipe.
        parameters: all, and those that serve one token.
        first_step: steps done when the run's own began.
        tokens: read in its own steps.
        flops: of its own steps, by PaLM's convention.
        loss: mean of its last steps' training losses, nats per token.
        held_out: set -> loss per token at its last evaluation.
        points: (tokens, FLOPs, set -> loss per token) of every evaluation.
        first_tokens: read before its own steps.
        recipe: of the run.
    """

    name: str
    parameters: tuple[int, int]
    first_step: int
    tokens: int
    flops: float
    loss: float
    held_out: dict[str, float]
    points: tuple[tuple[int, float, dict[str, float]], ...]
    first_tokens: int
    recipe: Recipe


def run_recipe(run: Path) -> Recipe:
    """The recipe that a run wrote.

    Raises:
        UserError: there is none.
    """
    if not (run / RECIPE).is_file():
        raise UserError(f"no {RECIPE} in it", where=str(run), fix="give the folder of a run")
    return load_recipe(run / RECIPE, saved=True)


def equal_flops(run: Path, other: Path, steps: int) -> int:
    """Steps of `run` that cost the FLOPs of so many steps of `other`, to the nearest whole one."""
    costs = []
    for recipe in map(run_recipe, (run, other)):
        length = recipe.data.sequence_length
        costs.append(recipe.training.global_batch_size * length * flops_per_token(recipe.model, length))
    return max(1, round(steps * costs[1] / costs[0]))


def read_curve(run: Path) -> RunCurve:
    """What a run has done.

    Raises:
        UserError: it is no run, or has made no step.
    """
    recipe = run_recipe(run)
    steps = read_metrics(run / METRICS, needs=("tokens", "loss")) if (run / METRICS).is_file() else []
    if not steps:
        raise UserError("has made no step", where=str(run), fix="start it first")
    count, first = count_parameters(recipe.model), steps[0]["step"] - 1
    begin = BatchPlan(recipe).tokens(first)
    points: dict[int, tuple[int, float, dict[str, float]]] = {}
    for record in read_metrics(run / METRICS, "evaluation", ("set", "tokens", "loss_per_token")):
        step = record["step"]
        point = points.setdefault(step, (record["tokens"] - begin, run_flops(recipe, first, step), {}))
        point[2][record["set"]] = record["loss_per_token"]
    last = [record["loss"] for record in steps if not record.get("skipped")][-_LAST:]
    return RunCurve(
        name=run.resolve().name,
        parameters=(count.total, count.total - count.non_embedding + count.active_non_embedding),
        first_step=first,
        tokens=steps[-1]["tokens"] - begin,
        flops=run_flops(recipe, first, steps[-1]["step"]),
        loss=sum(last) / len(last) if last else float("nan"),
        held_out=points[max(points)][2] if points else {},
        points=tuple(points[step] for step in sorted(points)),
        first_tokens=begin,
        recipe=recipe,
    )


def shared_sets(curves: Sequence[RunCurve]) -> list[str]:
    """Names of the held-out sets of every run's last evaluation; a run that was never evaluated is passed over.

    A mean over them alone is the same thing for every run.
    """
    evaluated = [set(curve.held_out) for curve in curves if curve.held_out]
    return sorted(set.intersection(*evaluated)) if evaluated else []


def format_table(curves: Sequence[RunCurve]) -> str:
    """The runs as lines of a table."""
    sets, shared = sorted({name for curve in curves for name in curve.held_out}), shared_sets(curves)
    rows = [
        ["run", "parameters", "for a token", "from step", "tokens", "FLOPs", "training loss", *sets, _mean_over(shared)]
    ]
    for curve in curves:
        held_out = [curve.held_out.get(name) for name in sets]
        losses = [
            "-" if loss is None else f"{loss:.4f}" for loss in (curve.loss, *held_out, _mean(curve.held_out, shared))
        ]
        numbers = [f"{value:,}" for value in (*curve.parameters, curve.first_step, curve.tokens)]
        rows.append([curve.name, *numbers, f"{curve.flops:.3g}", *losses])
    return "\n".join(aligned(rows))


def shifted(curves: Sequence[RunCurve]) -> list[list[tuple[float, float, float]]]:
    """(tokens, FLOPs, mean loss over the shared sets) of every run, counted from where the first of them began.

    A run that began later, a branch for one, has behind it what the first run had done by then: its tokens and FLOPs.
    An evaluation without one of the shared sets is left out.
    """
    first, shared = min(curves, key=_began), shared_sets(curves)
    moved: list[list[tuple[float, float, float]]] = []
    for curve in curves:
        tokens = curve.first_tokens - first.first_tokens
        flops = run_flops(first.recipe, first.first_step, curve.first_step)
        points = ((at, cost, _mean(losses, shared)) for at, cost, losses in curve.points)
        moved.append([(tokens + at, flops + cost, loss) for at, cost, loss in points if loss is not None])
    return moved


def _mean(losses: dict[str, float], sets: Sequence[str]) -> float | None:
    """The mean over `sets`, None where there are none or one of them has no loss."""
    return sum(losses[name] for name in sets) / len(sets) if sets and losses.keys() >= set(sets) else None


def _mean_over(sets: Sequence[str]) -> str:
    """Name a mean by its sets; of more than a picture has room for, by their number."""
    named = ", ".join(sets) if len(sets) <= _NAMED else f"{len(sets)} sets"
    return f"mean over {named}" if sets else "mean"


def draw(curves: Sequence[RunCurve], path: Path) -> None:
    """Mean loss on the shared validation sets over tokens and over FLOPs, side by side, as a picture.

    Raises:
        UserError: there is no set that all runs were evaluated on.
    """
    shared = shared_sets(curves)
    if not shared:
        raise UserError(
            "there is no validation set that all runs read, so no picture is drawn",
            where="--runs",
            fix="compare runs with evaluations of the same data.validation",
        )
    pyplot = offscreen_pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(10.5, 4), sharey=True)
    together = len({curve.first_step for curve in curves}) == 1
    since = "since the runs parted" if together else f"since the start of {min(curves, key=_began).name}"
    for axis, index, label in ((axes[0], 0, "tokens"), (axes[1], 1, "FLOPs")):
        for curve, points in zip(curves, shifted(curves), strict=True):
            axis.plot([each[index] for each in points], [each[2] for each in points], marker="o", label=curve.name)
        axis.set_xlabel(f"{label} {since}")
        axis.xaxis.set_major_formatter(lambda value, _: human(value).strip() if value > 0 else f"{value:g}")
    axes[0].set_ylabel(f"{VALIDATION_LOSS}\n{_mean_over(shared)}")
    legend_beside(axes[1], title="run")
    save_picture(figure, path)


def _began(curve: RunCurve) -> int:
    return curve.first_step
