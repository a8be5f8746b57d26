"""The coordinate check over widths and depths, muP beside standard parametrisation (section 3.1, Table 7).

If the parametrisation is right, sizes of activations, of their changes and of the logits after a few steps do not
depend on the width: their slope in log-log is near 0. Over depth muP's scale_depth / sqrt(layers) keeps the residual
stream level at the start and only damps its growth later; the paper, too, calls depth scaling empirical.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_megatron.errors import require
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.methods.polynomial import fit_line
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.storage import lock
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell, make_cell, model_of_size, size_name, standard_parametrization
from minicpm_megatron.windtunnel.coordinates.measure import QUANTITIES, Coordinates, measure
from minicpm_megatron.windtunnel.coordinates.picture import PICTURE, draw_coordinates
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.queue import Outcome
from minicpm_megatron.windtunnel.rates.sweep import NAMES, PARAMETRIZATIONS
from minicpm_megatron.windtunnel.results import Finding, Picture, Table, Verdict
from minicpm_megatron.windtunnel.settings import check_different
from minicpm_megatron.windtunnel.verdicts import all_of, below, opposite, within

KIND = "coord-check"
COORDINATES = "coordinates.json"
LEVEL = 0.1
"""A slope over width below this is level, as in the test of the model: 7 % for twice the width."""
LEVEL_AT_START = 0.05
_POLL = 0.5  # seconds


@dataclass(frozen=True)
class CoordinateSettings:
    """What is asked for.

    Attributes:
        widths: of models of `layers` layers; empty: none.
        depths: of models of `width`; empty: none.
        steps: of training.
        seeds: of initial weights; sizes are averaged over them in the log.
    """

    widths: tuple[int, ...]
    layers: int
    depths: tuple[int, ...]
    width: int
    steps: int
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        for option, sizes in (("--widths", self.widths), ("--depths", self.depths)):
            require(not sizes or len(set(sizes)) == len(sizes) >= 2, option, "not two or more different sizes")
            require(min(sizes, default=1) > 0, option, "not all above 0")
        require(bool(self.widths or self.depths), "--widths", "nothing to compare: neither --widths nor --depths")
        check_different("--seeds", self.seeds, "seeds")
        for option, count in (("--layers", self.layers), ("--width", self.width), ("--steps", self.steps)):
            require(count > 0, option, f"{count} is not above 0")


def plan_coordinates(base: Recipe, settings: CoordinateSettings, output: Path) -> Experiment:
    """A cell for every parametrisation, size and seed.

    Raises:
        UserError: a width that does not divide into heads, or a recipe of several ranks.
    """
    require(
        base.parallel.tensor_model_parallel_size * base.parallel.context_parallel_size == 1
        and base.parallel.pipeline_model_parallel_size == 1,
        "parallel",
        "the check runs in one process",
        "leave the section out",
    )
    require(base.model.num_moe_experts is None, "model.num_moe_experts", "the check is of dense models")
    sizes = [("width", width, settings.layers) for width in settings.widths]
    sizes += [("depth", settings.width, layers) for layers in settings.depths]
    cells = []
    for parametrization, (over, width, layers), seed in itertools.product(PARAMETRIZATIONS, sizes, settings.seeds):
        overrides = model_of_size(base, width, layers) | {
            "model.parametrization": "mup",
            "training.seed": seed,
            "schedule": {"shape": "constant", "total": settings.steps},
            # weights should move by their rate alone, and a step be one micro-batch
            "training.gradient_clipping": 0.0,
            "optimizer.weight_decay": 0.0,
            "training.batch_growth": [],
            "data.curriculum": [],
            "training.micro_batch_size": base.training.global_batch_size,
            "deepspeed": {"zero_stage": 0},
            "checkpoint": {},
            "evaluation": {},
        }
        if parametrization == "standard":
            overrides |= standard_parametrization(layers)
        labels = {"parametrization": parametrization, "over": over, "width": width, "layers": layers, "seed": seed}
        cells.append(
            make_cell(base, output, f"{parametrization}-{over}-{size_name(width, layers)}-s{seed}", overrides, labels)
        )
    title = f"Coordinate check after {settings.steps} steps (Table 7 of arXiv 2404.06395)"
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_coordinates)


def run_coordinates(experiment: Experiment, say: Callable[[str], None] = print) -> Outcome:
    """Measure every cell that no other process measures, and wait for those."""
    left, said = list(experiment.cells), False
    while left := [cell for cell in left if not progress.is_done(cell)]:
        claimed = False
        for cell in left:
            claim = lock.hold_if_free(cell.folder)
            if claim is None:
                continue
            with claim:
                claimed = True
                if not progress.is_done(cell):
                    say(_measure_cell(cell))
        if not claimed:
            if not said:
                say("the cells that are left are being measured by another process; waiting for it")
            said = True
            time.sleep(_POLL)
    return Outcome(done=[cell.name for cell in experiment.cells])


def _measure_cell(cell: Cell) -> str:
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.training.run_data import open_data

    recipe = cell.recipe
    layout = recipe.check_world_size(1)
    _join(layout, groups)
    samples, size = open_data(recipe).train, recipe.training.global_batch_size
    batches = [_stack(samples, number * size, size) for number in range(cell.last_step + 1)]
    began = time.perf_counter()
    found = measure(recipe, layout, batches[:-1], batches[-1])
    seconds = time.perf_counter() - began
    write_json(cell.folder / COORDINATES, _known(asdict(found)))
    progress.mark_done(cell)
    return f"{cell.name}: logits {found.start['logits']:.3f} -> {found.end['logits']:.3f} in {seconds:.1f} s"


def _join(layout: Any, groups: Any) -> None:
    from minicpm_megatron.parallel import device

    device.prepare()
    if not groups.is_initialized():
        groups.initialize(layout)


def _stack(samples: Any, first: int, count: int) -> Any:
    return np.stack([samples[first + number] for number in range(count)]).astype(np.int64)


def read_coordinates(cell: Cell) -> Coordinates | None:
    """What was measured; None where it was not."""
    try:
        content = json.loads((cell.folder / COORDINATES).read_bytes())
        return Coordinates(
            **{
                when: {name: math.nan if value is None else float(value) for name, value in sizes.items()}
                for when, sizes in content.items()
            }
        )
    except (OSError, ValueError, TypeError, AttributeError):
        return None


Key = tuple[str, str, str, str]
"""(parametrisation, "width" or "depth", "start", "end" or "change", quantity)."""
Points = Mapping[Key, Sequence[tuple[int, float]]]
"""Key -> (size, value) of every seed, rising."""
Slopes = Mapping[Key, Interval]


def collect(experiment: Experiment) -> Points:
    """What was measured, by what it is of."""
    found: dict[Key, list[tuple[int, float]]] = {}
    for cell in experiment.cells:
        measured, labels = read_coordinates(cell), cell.labels
        if measured is None:
            continue
        size = labels["width"] if labels["over"] == "width" else labels["layers"]
        for when, quantity in itertools.product(("start", "end", "change"), QUANTITIES):
            key = (labels["parametrization"], labels["over"], when, quantity)
            found.setdefault(key, []).append((size, getattr(measured, when)[quantity]))
    return {key: sorted(points) for key, points in found.items()}


def averaged(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Geometric mean over the seeds of each size; nan where a value is 0 or not finite."""
    sizes = sorted({size for size, _ in points})
    return [(size, geometric_mean([value for found, value in points if found == size])) for size in sizes]


def slopes_of(points: Points) -> dict[Key, Interval]:
    """Slopes in log-log with their limits by Student's t, infinite where two points leave no scatter."""
    found = {}
    for key, values in points.items():
        sizes = np.array([size for size, _ in values], dtype=float)
        heights = np.array([value for _, value in values])
        if len(set(sizes)) > 1 and np.isfinite(heights).all() and (heights > 0).all():
            found[key] = fit_line(np.log(sizes), np.log(heights)).slope_interval()
    return found


def evaluate_coordinates(experiment: Experiment) -> Findings:
    """Slopes, the picture and the verdicts."""
    points = collect(experiment)
    slopes, means = slopes_of(points), {key: averaged(values) for key, values in points.items()}
    findings = []
    if experiment.settings["widths"]:
        findings += [_level_over_width(slopes), _control(slopes)]
    if experiment.settings["depths"]:
        findings.append(_depth(slopes))
    draw_coordinates(means, {key: each.estimate for key, each in slopes.items()}, experiment.output / PICTURE)
    tables = [_table(means, slopes, over) for over in ("width", "depth") if any(key[1] == over for key in means)]
    caption = "Sizes over width and depth, at the start, after the steps, and of the change between"
    return Findings(tuple(findings), tuple(tables), (Picture(PICTURE, caption),))


def _level_over_width(slopes: Slopes) -> Finding:
    found = [slopes.get(("mup", "width", "end", quantity)) for quantity in QUANTITIES]
    level = [None if each is None else within(each, -LEVEL, LEVEL) for each in found]
    # one quantity that is known to grow or to fall contradicts the claim, whatever the others do
    verdict = False if False in level else all_of(level)
    return Finding(
        "Under muP sizes after a few steps do not depend on the width (Table 7; Tensor Programs V)",
        f"slopes of 0; level is below {LEVEL:g}",
        _slopes_text(found),
        verdict,
    )


def _control(slopes: Slopes) -> Finding:
    found = [slopes.get(("standard", "width", "end", quantity)) for quantity in QUANTITIES]
    # the opposite of all being nearly level
    level = [None if each is None else within(each, -2 * LEVEL, 2 * LEVEL) for each in found]
    verdict = True if False in level else opposite(all_of(level))
    claim = "In standard parametrisation they do (the control)"
    return Finding(claim, "not measured in the paper", _slopes_text(found), verdict)


def _slopes_text(found: Sequence[Interval | None]) -> str:
    return ", ".join(
        f"{name} {'not known' if each is None else _limits(each)}" for name, each in zip(QUANTITIES, found, strict=True)
    )


def _limits(slope: Interval) -> str:
    known = f"{slope.low:+.2f} to {slope.high:+.2f}" if slope.is_bounded else "limits not known"
    return f"{slope.estimate:+.2f} ({known})"


def _depth(slopes: Slopes) -> Finding:
    start, end, control = (
        slopes.get((name, "depth", when, "residual"))
        for name, when in (("mup", "start"), ("mup", "end"), ("standard", "end"))
    )
    verdict: Verdict = "undecided"
    ours = "not measured"
    if start is not None and end is not None and control is not None:
        verdict = all_of((within(start, -LEVEL_AT_START, LEVEL_AT_START), below(end, control)))
        ours = f"{_limits(start)} at the start, {_limits(end)} after; in standard parametrisation {_limits(control)}"
    return Finding(
        "scale_depth / sqrt(layers) keeps the residual stream level over depth at the start, and less steep than"
        " standard parametrisation after (Table 7; empirical, section 3.1)",
        "slope of 0",
        ours,
        verdict,
    )


def _table(sizes: Points, slopes: Slopes, over: str) -> Table:
    keys = [key for key in sizes if key[1] == over]
    every = sorted({size for key in keys for size, _ in sizes[key]})
    rows = []
    for key in keys:
        values = dict(sizes[key])
        texts = [f"{values[size]:.4g}" if math.isfinite(values.get(size, math.nan)) else "-" for size in every]
        slope = slopes.get(key)
        rows.append(
            (f"{NAMES[key[0]]}, {key[3]}, {key[2]}", *texts, "-" if slope is None else f"{slope.estimate:+.3f}")
        )
    unit = "width" if over == "width" else "layers"
    return Table(f"Root mean squares over {over}", ("", *(f"{unit} {size}" for size in every), "slope"), tuple(rows))


def geometric_mean(values: Sequence[float]) -> float:
    """nan where a value is 0 or not finite.

    >>> geometric_mean([1.0, 4.0])
    2.0
    """
    if not all(math.isfinite(value) and value > 0 for value in values):
        return math.nan
    return math.exp(sum(map(math.log, values)) / len(values))


def _known(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known(inner) for key, inner in value.items()}
    return value if math.isfinite(value) else None
