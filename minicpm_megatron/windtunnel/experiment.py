"""An experiment: its cells, the folder that is its own, the plan that is printed before it starts, and its results."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from minicpm_megatron.recipe import Recipe, dump_recipe, recipe_hash
from minicpm_megatron.storage import lock
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.storage.claim import claim
from minicpm_megatron.storage.manifest import library_versions
from minicpm_megatron.training.metrics import duration, human
from minicpm_megatron.training.text import aligned
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell, check_base, check_names, data_fingerprints
from minicpm_megatron.windtunnel.machine import describe_machine
from minicpm_megatron.windtunnel.queue import Outcome, Source
from minicpm_megatron.windtunnel.results import Finding, Picture, Results, Table, format_results, write_results

Ended = Literal["done", "stopped", "failed"]
BASE_RECIPE = "base.yaml"
# how cells measure their validation losses; one experiment must not mix cells of two ways
MEASURE = "every sample of a set, weighted by tokens; bytes of the tokens read"
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Findings:
    """What the evaluation of finished cells gives."""

    findings: tuple[Finding, ...]
    tables: tuple[Table, ...]
    pictures: tuple[Picture, ...]


@dataclass(frozen=True)
class Experiment:
    """Cells with a purpose.

    Attributes:
        kind: the subcommand.
        title: one line for people.
        settings: what was asked for, as JSON values; with `base` they decide the cells.
        base: the recipe that all cells are made of.
        cells: those known before anything is run, trunks before their branches.
        output: the experiment's folder.
        evaluate: what the cells that are done tell; called when no cell is left, and again by every later start.
        notes: lines below the plan.
        source: decides on further cells as results come in; `cells` are among its own.
        extendable: settings that another start may change, because they only add cells.
    """

    kind: str
    title: str
    settings: Mapping[str, Any]
    base: Recipe
    cells: tuple[Cell, ...]
    output: Path
    evaluate: Callable[[Experiment], Findings]
    notes: tuple[str, ...] = ()
    source: Source | None = None
    extendable: frozenset[str] = frozenset()

    def every_cell(self) -> tuple[Cell, ...]:
        """Those that are known now, by any process."""
        return self.cells if self.source is None else self.source.cells()

    def costs(self) -> tuple[int, int, float]:
        """(runs, tokens, FLOPs) of all cells, those not yet decided included."""
        cells = self.every_cell()
        left = 0 if self.source is None else max(0, self.source.expected - len(cells))
        every = [*cells, *([cells[0]] * left)]
        return len(every), sum(cell.tokens() for cell in every), sum(cell.flops() for cell in every)

    def claim(self) -> None:
        """Make the output folder this experiment's, or see that it is.

        Raises:
            UserError: it is something else's, or cannot be written; tokens are missing.
        """
        check_base(self.base)
        check_names(self.cells)
        plan = {
            "kind": self.kind,
            "settings": {key: value for key, value in self.settings.items() if key not in self.extendable},
            "recipe": recipe_hash(self.base),
            "data": data_fingerprints(self.base),
            "cells": {cell.name: cell.fingerprint for cell in self.cells},
            "measure": MEASURE,
        }
        claim(
            self.output,
            plan,
            "holds another experiment, this one with other settings, or one whose losses an earlier version measured",
        )

    def state(self, cell: Cell) -> str:
        """ "done", "diverged", "failed" or "missing"."""
        if progress.is_done(cell):
            return "done" if progress.divergence(cell) is None else "diverged"
        return "missing" if progress.failure(cell) is None else "failed"

    def results(self) -> Results:
        """What is known now, evaluated; pictures are written."""
        found = self.evaluate(self)
        return Results(
            kind=self.kind,
            title=self.title,
            settings=self.settings,
            recipe=recipe_hash(self.base),
            data=data_fingerprints(self.base),
            versions=library_versions(),
            findings=found.findings,
            tables=found.tables,
            pictures=found.pictures,
            cells=tuple(self._cell_values(cell) for cell in self.every_cell()),
            machine=describe_machine(),
        )

    def _cell_values(self, cell: Cell) -> dict[str, Any]:
        measured = progress.measured(cell)
        return {
            "name": cell.name,
            "state": self.state(cell),
            "parameters": cell.parameters,
            "tokens": cell.tokens(),
            "flops": cell.flops(),
            "seconds": measured.seconds,
            "held_out": measured.held_out,
            "losses": measured.per_set,
            "labels": dict(cell.labels),
        }


def format_plan(experiment: Experiment, flops_per_second: float | None = None, workers: int = 1) -> str:
    """The cells as a table: parameters, tokens, FLOPs of each and of all, and the time where a rate is known.

    Args:
        flops_per_second: of one worker; None: as measured in this output's cells that have begun, if there are any.
        workers: cells at once.
    """
    known = experiment.every_cell()
    rate = flops_per_second or _measured_rate(known)
    rows = [("cell", "parameters", "tokens", "FLOPs", "time", "from")]
    for cell in known:
        origin = "" if cell.trunk is None else f"{cell.trunk}@{cell.first_step}"
        rows.append((cell.name, f"{cell.parameters:,}", f"{cell.tokens():,}", *_cost(cell.flops(), rate), origin))
    runs, tokens, flops = experiment.costs()
    if runs > len(known):
        left, each = runs - len(known), known[0]
        costs = _cost(left * each.flops(), rate)
        rows.append((f"{left} decided on the way", f"{each.parameters:,}", f"{left * each.tokens():,}", *costs, ""))
    rows.append((f"{runs} cells", "", f"{tokens:,}", *_cost(flops, rate and rate * workers), ""))
    lines = [experiment.title, *aligned(rows), *experiment.notes]
    if rate is None:
        lines.append("time: not known before the first steps; --flops-per-second gives a rate")
    else:
        source = "given" if flops_per_second else "measured in this folder"
        lines.append(f"time: at {human(rate)}FLOP/s ({source}) and {workers} at once, starts of the trainer left out")
    return "\n".join(lines)


def _cost(flops: float, rate: float | None) -> tuple[str, str]:
    return f"{flops:.3g}", "-" if rate is None else duration(flops / rate)


def _measured_rate(cells: Sequence[Cell]) -> float | None:
    """FLOP/s of a worker over all that has been run."""
    seconds = flops = 0.0
    for cell in cells:
        found = progress.measured(cell)
        if found.seconds and math.isfinite(found.flops_per_second):
            seconds, flops = seconds + found.seconds, flops + found.seconds * found.flops_per_second
    return flops / seconds if seconds else None


def run_experiment(
    experiment: Experiment,
    run: Callable[[], Outcome],
    say: Callable[[str], None] = print,
    *,
    workers: int = 1,
) -> Ended:
    """Run what is left of an experiment and write its results.

    Args:
        run: runs the cells, and waits for those that other processes run.
        workers: cells at once, for the plan.

    Returns:
        "done" with all cells, "stopped" before all were tried, "failed" where one has.

    Raises:
        UserError: the output is another experiment's or cannot be written, tokens are missing, the launcher cannot
            be started, or the results cannot be told from what was run.
    """
    experiment.claim()
    with turn(experiment.output):
        write_bytes(experiment.output / BASE_RECIPE, dump_recipe(experiment.base).encode())
    say(format_plan(experiment, workers=workers))
    outcome = run()
    if outcome.stopped:
        say(f"stopped with {len(outcome.done)} of {experiment.costs()[0]} cells done; start again to go on")
        return "stopped"
    _report_failures(outcome, say)
    if outcome.done:
        with turn(experiment.output):
            results = experiment.results()
            write_results(results, experiment.output)
        say(format_results(results, experiment.output))
    return "failed" if outcome.failed or outcome.blocked else "done"


def _report_failures(outcome: Outcome, say: Callable[[str], None]) -> None:
    for name, failed in outcome.failed.items():
        say(f"failed: {name}: {failed.reason}; log: {failed.log}")
    if outcome.blocked:
        say(f"not started, for want of the checkpoint to branch from: {', '.join(outcome.blocked)}")
    if outcome.failed or outcome.blocked:
        say("start the command again to try these cells once more")


@contextmanager
def turn(output: Path) -> Iterator[None]:
    """Wait until no other process writes the experiment's own files, then keep others waiting.

    Raises:
        UserError: the folder cannot be written.
    """
    while (handle := lock.hold_if_free(output)) is None:
        time.sleep(_POLL)
    with handle:
        yield
