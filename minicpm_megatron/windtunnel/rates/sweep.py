"""The learning-rate sweep of section 3.3 (figure 3): does the best base rate move with the size of the model?

Cells: every parametrisation x size x rate x seed, all of one recipe. The loss is the held-out one at the end. The
optimum of each size is the minimum of a parabola of the loss over log2 of the rate (`methods.rate_law`), the shift over
sizes one slope: octaves of the best rate an octave of the size N. Standard parametrisation is run beside muP as the
control: if it did not move either, the sweep would show nothing.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.methods.rate_law import RateOptimum, RateShift, optimal_rate, rate_shift
from minicpm_megatron.recipe import OptimizerRecipe, Recipe
from minicpm_megatron.training.text import number
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import (
    Cell,
    make_cell,
    model_of_size,
    schedule_of_length,
    size_name,
    standard_parametrization,
)
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.noise import seeds_text
from minicpm_megatron.windtunnel.rates.picture import PICTURE, draw_rates
from minicpm_megatron.windtunnel.results import Finding, Picture, Table, Verdict
from minicpm_megatron.windtunnel.settings import are_different_and_positive, check_different
from minicpm_megatron.windtunnel.verdicts import above, all_of, below, within

KIND = "lr"
Parametrization = Literal["mup", "standard"]
PARAMETRIZATIONS: tuple[Parametrization, ...] = ("mup", "standard")
NAMES = {"mup": "muP", "standard": "standard"}
STANDARD_DIVISOR = 4.0
"""Rates of the standard parametrisation are those of muP over this unless they are given: ours, so that at widths of
64 and more both grids enclose their optimum."""
OCTAVE = 1.0
"""A spread of the optimum below one octave is a grid step of the paper's figure 3, and no 'noticeable shift'."""


@dataclass(frozen=True)
class RateSettings:
    """What is asked for.

    Attributes:
        sizes: (width, layers) of each model.
        rates: base rates of muP.
        standard_rates: rates of the standard parametrisation.
        parametrizations: which of the two are run.
        seeds: each decides initial weights and sample order.
        tokens_per_parameter: length of each run in tokens a parameter (N, embeddings left out); None: the recipe's
            schedule for all sizes.
    """

    sizes: tuple[tuple[int, int], ...]
    rates: tuple[float, ...]
    standard_rates: tuple[float, ...]
    parametrizations: tuple[Parametrization, ...]
    seeds: tuple[int, ...]
    tokens_per_parameter: float | None = None

    def __post_init__(self) -> None:
        check_different("--sizes", self.sizes, "sizes")
        for option, rates in (("--rates", self.rates), ("--standard-rates", self.standard_rates)):
            good = are_different_and_positive(rates, least=3)
            require(good, option, "not a list of at least three different positive rates")
        check_different("--seeds", self.seeds, "seeds")
        require(len(set(self.parametrizations)) == len(self.parametrizations) >= 1, "--parametrizations", "given twice")
        per = self.tokens_per_parameter
        require(per is None or (per > 0 and math.isfinite(per)), "--tokens-per-parameter", f"{per} is not positive")

    def rates_of(self, parametrization: Parametrization) -> tuple[float, ...]:
        """The grid of a parametrisation, rising."""
        return tuple(sorted(self.rates if parametrization == "mup" else self.standard_rates))


@dataclass(frozen=True)
class Sweep:
    """The losses of one model size.

    Attributes:
        parameters: N.
        rates: [rates], rising.
        losses: [seeds, rates]; nan where a run diverged or is missing.
        optimum: None where the grid does not tell it; `why` says why.
    """

    parametrization: Parametrization
    width: int
    layers: int
    parameters: int
    rates: tuple[float, ...]
    losses: np.ndarray
    optimum: RateOptimum | None
    why: str = ""

    @property
    def size(self) -> str:
        """As the user writes it."""
        return size_name(self.width, self.layers)


def plan_rates(base: Recipe, settings: RateSettings, output: Path) -> Experiment:
    """The cells of a sweep.

    Raises:
        UserError: a size that does not divide into heads, or a recipe that is not valid with it.
    """
    cells = [
        _cell(base, output, settings, parametrization, size, rate, seed)
        for size in settings.sizes
        for parametrization in settings.parametrizations
        for rate, seed in itertools.product(settings.rates_of(parametrization), settings.seeds)
    ]
    sizes = ", ".join(size_name(*size) for size in settings.sizes)
    title = f"Learning-rate sweep over {sizes} (section 3.3 of arXiv 2404.06395)"
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_rates)


def _cell(
    base: Recipe,
    output: Path,
    settings: RateSettings,
    parametrization: Parametrization,
    size: tuple[int, int],
    rate: float,
    seed: int,
) -> Cell:
    width, layers = size
    overrides: dict[str, Any] = model_of_size(base, width, layers)
    overrides |= {"optimizer.lr": rate, "training.seed": seed}
    if parametrization == "standard":
        overrides |= standard_parametrization(layers)
    else:
        overrides |= {"model.parametrization": "mup"}
    labels = {"parametrization": parametrization, "width": width, "layers": layers, "rate": rate, "seed": seed}
    name = f"{parametrization}-{size_name(width, layers)}-lr{rate:g}-s{seed}"
    cell = make_cell(base, output, name, overrides, labels)
    if settings.tokens_per_parameter is None:
        return cell
    overrides["schedule"] = schedule_of_length(base, cell, settings.tokens_per_parameter)
    return make_cell(base, output, name, overrides, labels)


def read_sweeps(experiment: Experiment) -> list[Sweep]:
    """The losses of every size that were measured, with their optima."""
    settings = experiment.settings
    by_labels = {_key(cell.labels): cell for cell in experiment.cells}
    sweeps = []
    for parametrization, (width, layers) in itertools.product(settings["parametrizations"], settings["sizes"]):
        rates = sorted(settings["rates" if parametrization == "mup" else "standard_rates"])
        cells = [
            [by_labels[parametrization, width, layers, rate, seed] for rate in rates] for seed in settings["seeds"]
        ]
        losses = np.array([[progress.measured(cell).held_out for cell in row] for row in cells])
        optimum, why = _optimum(rates, losses)
        n = cells[0][0].parameters
        sweeps.append(Sweep(parametrization, width, layers, n, tuple(rates), losses, optimum, why))
    return sweeps


def _key(labels: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(labels[key] for key in ("parametrization", "width", "layers", "rate", "seed"))


def _optimum(rates: Sequence[float], losses: np.ndarray) -> tuple[RateOptimum | None, str]:
    try:
        return optimal_rate(rates, losses), ""
    except UserError as error:
        return None, error.what


def shift_of(sweeps: Sequence[Sweep]) -> RateShift | None:
    """How the optimum moves over the sizes N of one parametrisation; None where fewer than two sizes tell it."""
    known = [(sweep.parameters, sweep.optimum.rate) for sweep in sweeps if sweep.optimum is not None]
    if len({size for size, _ in known}) < 2:
        return None
    return rate_shift(*zip(*known, strict=True))


def evaluate_rates(experiment: Experiment) -> Findings:
    """Optima, shifts, the table and the picture."""
    sweeps = read_sweeps(experiment)
    groups = {name: [each for each in sweeps if each.parametrization == name] for name in PARAMETRIZATIONS}
    shifts: dict[str, RateShift | None] = {name: shift_of(group) for name, group in groups.items()}
    findings = []
    if groups["mup"]:
        findings += [_best_rate(groups["mup"]), _no_shift(groups["mup"], shifts["mup"])]
    if groups["standard"]:
        findings.append(_control(groups["standard"], shifts))
    draw_rates(sweeps, shifts, experiment.output / PICTURE)
    caption = "Validation loss over the base learning rate, by parametrization and size; parabolas and their minima"
    return Findings(tuple(findings), _tables(sweeps, shifts), (Picture(PICTURE, caption),))


def _best_rate(sweeps: Sequence[Sweep]) -> Finding:
    default = OptimizerRecipe().lr
    # a grid step either way: the rate depends on the length, the batch and the data, which are not the paper's
    nearest, farthest = default / 2**OCTAVE, default * 2**OCTAVE
    near = [None if sweep.optimum is None else within(sweep.optimum.interval(), nearest, farthest) for sweep in sweeps]
    # one size whose rate is known to lie elsewhere contradicts the claim, whatever the others are
    verdict = False if False in near else all_of(near)
    ours = "; ".join(f"{sweep.size}: {_optimum_text(sweep)}" for sweep in sweeps)
    return Finding(
        "Under muP the best base rate is near 0.01 whatever the size (section 3.3)", f"{default:g}", ours, verdict
    )


def _no_shift(sweeps: Sequence[Sweep], shift: RateShift | None) -> Finding:
    claim = "Under muP the best base rate does not shift noticeably with the size (section 3.3, figure 3)"
    paper = "no noticeable shift over ten times the size"
    spread = spread_of(sweeps)
    verdict: Verdict = "undecided" if spread is None else within(spread, -math.inf, OCTAVE)
    return Finding(claim, paper, _shift_text(shift, spread), verdict)


def spread_of(sweeps: Sequence[Sweep]) -> Interval | None:
    """Octaves between the highest and the lowest best rate with limits by those of the rates.

    None where fewer than two sizes are there, or the grid of one does not tell its optimum.
    """
    rates = [sweep.optimum.interval() for sweep in sweeps if sweep.optimum is not None]
    if len(rates) < len(sweeps) or len(rates) < 2:
        return None
    with np.errstate(divide="ignore"):  # a rate whose limits are not known has a limit of 0
        low, best, high = (np.log2([getattr(rate, name) for rate in rates]) for name in ("low", "estimate", "high"))
    # the highest of the lower limits and the lowest of the upper ones are certainly so far apart
    return Interval(max(0.0, float(low.max() - high.min())), float(np.ptp(best)), float(high.max() - low.min()))


def _control(sweeps: Sequence[Sweep], shifts: Mapping[str, RateShift | None]) -> Finding:
    claim = "In standard parametrisation the best rate falls as the model grows (the control; Tensor Programs V)"
    shift, mup, spread = shifts["standard"], shifts["mup"], spread_of(sweeps)
    verdict: Verdict = "undecided"
    if shift is not None:
        slope = shift.slope_interval()
        falls = [below(slope, Interval(0.0, 0.0, 0.0)), None if spread is None else above(spread, OCTAVE)]
        verdict = all_of(falls if mup is None else [*falls, below(slope, mup.slope_interval())])
    edges = [f"{sweep.size} {sweep.why}" for sweep in sweeps if sweep.optimum is None]
    ours = "; ".join([_shift_text(shift, spread), *edges])
    return Finding(claim, "not measured in the paper", ours, verdict)


def _shift_text(shift: RateShift | None, spread: Interval | None) -> str:
    if shift is None:
        return "not known: fewer than two sizes have an optimum inside their grid"
    slope, octaves = shift.slope_interval(), spread or Interval(-math.inf, shift.spread, math.inf)
    return (
        f"slope {shift.slope:+.3f}{_known(slope)} octaves of the rate an octave of N,"
        f" spread {octaves.estimate:.2f}{_known(octaves)} octaves"
    )


def _optimum_text(sweep: Sweep) -> str:
    if sweep.optimum is None:
        return f"not known ({sweep.why})"
    return f"{sweep.optimum.rate:.3g}{_known(sweep.optimum.interval())}"


def _known(limits: Interval) -> str:
    return f" ({_limits(limits)})" if limits.is_bounded else " (limits not known)"


def _limits(limits: Interval) -> str:
    return f"{number(limits.low)} to {number(limits.high)}" if limits.is_bounded else "-"


def _tables(sweeps: Sequence[Sweep], shifts: Mapping[str, RateShift | None]) -> tuple[Table, ...]:
    tables = []
    for name in PARAMETRIZATIONS:
        group = [sweep for sweep in sweeps if sweep.parametrization == name]
        if not group:
            continue
        columns = ("size", "N", *(f"{rate:g}" for rate in group[0].rates), "best rate", "95 %", "loss there")
        rows = tuple(_row(sweep) for sweep in group)
        told = seeds_text(len(group[0].losses))
        title = f"{NAMES[name]}: held-out loss (nats per token, {told}) at each base rate"
        tables.append(Table(title, columns, rows))
    rows = tuple(
        (NAMES[name], *(_shift_row(shift)))
        for name, shift in shifts.items()
        if any(sweep.parametrization == name for sweep in sweeps)
    )
    shift_columns = ("", "slope (octaves of the rate an octave of N)", "95 %", "spread (octaves)")
    return (*tables, Table("Shift of the best rate over the sizes", shift_columns, rows))


def _row(sweep: Sweep) -> tuple[str, ...]:
    means = [f"{mean:.4f}" if math.isfinite(mean) else "-" for mean in sweep.losses.mean(axis=0)]
    head = (sweep.size, f"{sweep.parameters:,}", *means)
    if sweep.optimum is None:
        return (*head, "-", sweep.why, "-")
    return (*head, f"{sweep.optimum.rate:.3g}", _limits(sweep.optimum.interval()), f"{sweep.optimum.loss:.4f}")


def _shift_row(shift: RateShift | None) -> tuple[str, str, str]:
    if shift is None:
        return ("-", "-", "-")
    return (f"{shift.slope:+.3f}", _limits(shift.slope_interval()), f"{shift.spread:.2f}")
