"""What runs at several batch sizes tell: contours, the law through their minima, and section 3.2 beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.methods.batch_size_bootstrap import (
    LEAST_POINTS,
    BootstrappedBatchSize,
    Contour,
    bootstrap,
    equal_loss_contours,
)
from minicpm_megatron.methods.batch_size_law import PUBLISHED, BatchRun
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.recipe import BatchPlan
from minicpm_megatron.training.text import number
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.batches.picture import CONTOURS, LAW, draw_contours, draw_law
from minicpm_megatron.windtunnel.cells import Cell, size_name
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.noise import seeds_text
from minicpm_megatron.windtunnel.results import Finding, Picture, Table, Verdict
from minicpm_megatron.windtunnel.verdicts import above, all_of, holds, within

OCTAVE = 1.0
"""A best batch that moves by less than an octave over the sizes, at equal loss, does not depend on them: ours, a step
of the usual grid of batch sizes."""
SHARP = 2.0
"""Limits of b that are further apart than this agree with nothing: ours, as a b uncertain by 1 is a factor of 3 in the
batch over the paper's losses of 2.5 to 4 on either side."""
_CLAIM = "The best batch grows as the loss falls, bs = a / L^b (section 3.2, figures 1 and 2)"


@dataclass(frozen=True)
class Reading:
    """What finished runs are asked; it decides no run.

    Attributes:
        losses: at which contours are drawn; none: `contours` of them over what the runs reach.
        contours: how many, where `losses` are not given.
        predict: expected losses, to give the batch size for.
    """

    losses: tuple[float, ...] = ()
    contours: int = 8
    predict: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        for option, losses in (("--losses", self.losses), ("--predict", self.predict)):
            require(all(0 < loss < math.inf for loss in losses), option, "not a list of positive losses")
        require(len(set(self.losses)) == len(self.losses), "--losses", "not a list of different losses")
        require(self.contours >= 3, "--contours", f"{self.contours} are too few for a line and its limits")


@dataclass(frozen=True)
class Measured:
    """What the runs that are done tell.

    Attributes:
        names: N -> the size as the user writes it.
        runs: the held-out curves after the warmup, one a run.
        contours: of every size.
        law: None where the minima are too few; `why` says so.
    """

    names: dict[float, str]
    runs: tuple[BatchRun, ...]
    contours: tuple[Contour, ...]
    law: BootstrappedBatchSize | None
    why: str = ""

    @property
    def hidden(self) -> list[Contour]:
        """Contours of enough points whose minimum the batch sizes do not enclose."""
        return [each for each in self.contours if each.minimum is None and each.is_enough]


def read_runs(experiment: Experiment, reading: Reading) -> Measured:
    """The curves of all runs that are done and did not diverge, their contours and the law."""
    found = [(cell, curve) for cell in experiment.cells if (curve := _curve(cell)) is not None]
    names = {float(cell.parameters): size_name(cell.labels["width"], cell.labels["layers"]) for cell, _ in found}
    runs = tuple(curve for _, curve in found)
    contours = _contours(runs, reading)
    try:
        return Measured(names, runs, contours, bootstrap(contours))
    except UserError as error:
        return Measured(names, runs, contours, None, error.what)


def _curve(cell: Cell) -> BatchRun | None:
    if not progress.is_whole(cell):
        return None
    plan, warmup = BatchPlan(cell.recipe), cell.recipe.schedule.warmup
    points = [(plan.tokens(step), loss) for step, loss in progress.evaluations(cell) if plan.tokens(step) > warmup]
    if not points:
        return None
    tokens, loss = np.array(points, dtype=np.float64).T
    return BatchRun(float(cell.parameters), float(cell.labels["batch_tokens"]), tokens, loss)


def _contours(runs: Sequence[BatchRun], reading: Reading) -> tuple[Contour, ...]:
    """At the losses that are asked for; or evenly in log loss, for each size where its runs give enough points."""
    if reading.losses or not runs:
        return tuple(equal_loss_contours(runs, reading.losses))
    ranges = {size: _range([run for run in runs if run.size == size]) for size in {run.size for run in runs}}
    ends = [end for low, high in ranges.values() if low < high for end in (low, high)]
    if not ends:
        return ()
    losses = np.geomspace(max(ends), min(ends), reading.contours + 2)[1:-1]  # at the ends only some runs would be read
    found: list[Contour] = []
    for size, (low, high) in sorted(ranges.items()):
        inside = [float(loss) for loss in losses if low <= loss <= high]
        found += [each for each in equal_loss_contours(runs, inside) if each.size == size]
    return tuple(found)


def _range(runs: Sequence[BatchRun]) -> tuple[float, float]:
    """From the loss that enough runs come down to, to the one that all of them begin above."""
    last = sorted(float(run.loss[-1]) for run in runs)
    return last[min(LEAST_POINTS, len(last)) - 1], min(float(run.loss[0]) for run in runs)


def evaluate_batches(experiment: Experiment, reading: Reading) -> Findings:
    """Findings, tables, and figures 1 and 2."""
    measured = read_runs(experiment, reading)
    tables = [_final_table(experiment), _contour_table(measured)]
    pictures = []
    if measured.runs:
        draw_contours(measured.names, measured.runs, measured.contours, experiment.output / CONTOURS)
        pictures.append(
            Picture(
                CONTOURS,
                "Tokens that reach equal losses over the batch size, parabolas and their minima (figure 1)",
            )
        )
    if measured.law is None:
        reason = f"no law: {measured.why}{_hidden_text(measured)}"
        failed = Finding(_CLAIM, f"b = {PUBLISHED.b:g}", reason, "undecided")
        return Findings((failed,), tuple(tables), tuple(pictures))
    draw_law(measured.names, measured.law, experiment.output / LAW)
    pictures.append(
        Picture(LAW, "Best batch size over the loss: the minima, the law through them, and the paper's (figure 2)")
    )
    tables += [_law_table(measured.law), _prediction_table(measured.law, reading.predict)]
    findings = (_grows(measured, measured.law), _one_line(measured, measured.law), _same_exponent(measured.law))
    return Findings(findings, tuple(tables), tuple(pictures))


def _grows(measured: Measured, law: BootstrappedBatchSize) -> Finding:
    limits = law.b_interval()
    minima = law.fit.minima
    ours = f"b = {_limits(limits)}, from {len(minima)} minima of {len({each.size for each in minima})} sizes"
    verdict = above(limits)
    if verdict != "undecided" and not all(_continues(each, law, grows=verdict) for each in measured.hidden):
        verdict = "undecided"
    return Finding(_CLAIM, f"b = {PUBLISHED.b:g}", ours + _hidden_text(measured), verdict)


def _continues(contour: Contour, law: BootstrappedBatchSize, *, grows: bool) -> bool:
    """Whether a contour that is lowest beyond the grid is what the line makes of a grid that is too short.

    It is missing from the line. At a higher loss than the minima's its batch should be beyond the smallest one where
    the batch grows as the loss falls, at a lower loss beyond the largest.
    """
    own = [each.loss for each in law.fit.minima if each.size == contour.size]
    losses = own or [each.loss for each in law.fit.minima]
    if contour.loss > max(losses):
        return contour.beyond == ("smallest" if grows else "largest")
    return contour.loss < min(losses) and contour.beyond == ("largest" if grows else "smallest")


def _hidden_text(measured: Measured) -> str:
    low, high = (sum(each.beyond == side for each in measured.hidden) for side in ("smallest", "largest"))
    parts = [
        f"{many} are lowest {where}"
        for many, where in (
            (low, "beyond the smallest batch"),
            (high, "beyond the largest batch"),
            (len(measured.hidden) - low - high, "nowhere"),
        )
        if many
    ]
    return f"; of the other contours {', '.join(parts)}" if parts else ""


def _one_line(measured: Measured, law: BootstrappedBatchSize) -> Finding:
    claim = "At equal loss the best batch does not depend on the size: the lines of all sizes are one (section 3.2)"
    paper = "the lines connect well into one, over 19 times the size"
    sizes = sorted({each.size for each in law.fit.minima})
    slope = law.size_interval()
    if slope is None:
        return Finding(claim, paper, "not known: the minima are of one size, or too few", "undecided")
    octaves = math.log2(sizes[-1] / sizes[0])
    shift = Interval(*(octaves * value for value in (slope.low, slope.estimate, slope.high)))
    ours = f"{_limits(shift, '+.2f')} octaves over {sizes[-1] / sizes[0]:.2g} times the size"
    return Finding(claim, paper, ours, within(shift, -OCTAVE, OCTAVE))


def _same_exponent(law: BootstrappedBatchSize) -> Finding:
    limits = law.b_interval()
    losses = [each.loss for each in law.fit.minima]
    parallel = law.b_at_size_interval()
    within = "" if parallel is None else f"; within a size b = {_limits(parallel)}"
    ours = (
        f"bs = {law.fit.law.a:.3g} / L^{law.fit.law.b:.3g}, b = {_limits(limits)}{within}; losses {min(losses):.3g}"
        f" to {max(losses):.3g} of other text and another vocabulary than the paper's, so at most b can be compared"
    )
    sharp: Verdict = True if limits.high - limits.low < SHARP else "undecided"
    verdict = all_of((holds(limits, PUBLISHED.b), sharp))
    claim = "The exponent of the batch-size law (section 3.2)"
    return Finding(claim, f"bs = {PUBLISHED.a:g} / L^{PUBLISHED.b:g}, L on C4", ours, verdict)


def _final_table(experiment: Experiment) -> Table:
    settings = experiment.settings
    rows = []
    for width, layers in settings["sizes"]:
        cells = [each for each in experiment.cells if (each.labels["width"], each.labels["layers"]) == (width, layers)]
        by_batch: dict[int, list[float]] = {batch: [] for batch in sorted(settings["batches"])}
        for cell in cells:
            by_batch[cell.labels["batch_tokens"]].append(progress.measured(cell).held_out)
        means = (float(np.mean(losses)) for losses in by_batch.values())
        shown = (f"{mean:.4f}" if math.isfinite(mean) else "-" for mean in means)
        rows.append((size_name(width, layers), f"{cells[0].parameters:,}", *shown))
    columns = ("size", "N", *(f"{batch:,}" for batch in sorted(settings["batches"])))
    tokens = experiment.cells[0].tokens()
    told = seeds_text(len(settings["seeds"]))
    title = f"Held-out loss (nats per token, {told}) after {tokens:,} tokens at each batch size"
    return Table(title, columns, tuple(rows))


def _contour_table(measured: Measured) -> Table:
    rows = []
    for each in measured.contours:
        head = (measured.names[each.size], f"{each.size:,.0f}", f"{each.loss:.4g}", str(len(each.runs)))
        if each.minimum is None:
            beyond = f"beyond the {each.beyond}" if each.beyond else "no minimum" if each.is_enough else "too few runs"
            rows.append((*head, beyond, "-", "-"))
            continue
        limits = each.minimum.batch_interval
        known = f"{number(limits.low)} to {number(limits.high)}" if math.isfinite(limits.high) else "-"
        rows.append((*head, f"{each.minimum.batch:,.0f}", known, f"{each.minimum.tokens:,.0f}"))
    columns = ("size", "N", "loss", "runs", "best batch (tokens)", "95 %", "tokens to the loss")
    return Table("Equal-loss contours and their minima", columns, tuple(rows))


def _law_table(law: BootstrappedBatchSize) -> Table:
    rows = [
        ("a (tokens)", f"{law.fit.law.a:.3g}", _range_text(law.predict_interval(1.0)), f"{PUBLISHED.a:g}"),
        ("b", f"{law.fit.law.b:.3g}", _range_text(law.b_interval()), f"{PUBLISHED.b:g}"),
    ]
    parallel = law.b_at_size_interval()
    if parallel is not None:
        rows.append(("b within a size", f"{parallel.estimate:.3g}", _range_text(parallel), "-"))
    return Table("bs = a / L^b", ("", "ours", "95 %", "paper (C4)"), tuple(rows))


def _prediction_table(law: BootstrappedBatchSize, asked: Iterable[float]) -> Table:
    measured = [each.loss for each in law.fit.minima]
    low, high = min(measured), max(measured)
    rows = []
    for loss in sorted({low, high, *asked}, reverse=True):
        limits = law.predict_interval(loss)
        note = "" if low <= loss <= high else "extrapolated"
        paper = f"{PUBLISHED.predict(loss):,.0f}"
        rows.append((f"{loss:.4g}", f"{limits.estimate:,.0f}", _range_text(limits), paper, note))
    title = f"Batch size in tokens for an expected loss (minima at losses {low:.4g} to {high:.4g})"
    return Table(title, ("loss", "ours", "95 %", "paper's law, for a loss on C4", ""), tuple(rows))


def _range_text(limits: Interval) -> str:
    return f"{number(limits.low)} to {number(limits.high)}"


def _limits(limits: Interval, form: str = ".3g") -> str:
    return f"{limits.estimate:{form}} (95 % {limits.low:{form}} to {limits.high:{form}})"
