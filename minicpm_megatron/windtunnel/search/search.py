"""The search of section 3.1 and appendix A.1: scale_depth, scale_emb, init_std and the base rate of a small model.

A trial is a cell, and so is each repeat of a trial with another seed. The paper's set is the first trial; every
further one is decided when there is room for it, by whichever process has that room, from the results that stand in
the cells by then (`propose`), and is written down (`trials`) before it is begun. So whatever is killed, a trial stays
what it was, and with one worker the trials are those of a search that nobody has disturbed. Once all trials have
ended, the paper's set and the best of the others are run again with other seeds: what was chosen for its loss has a
loss that flatters it, and only runs that had no part in the choice tell the difference.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import require
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell, make_cell, model_of_size, schedule_of_length
from minicpm_megatron.windtunnel.experiment import Experiment, turn
from minicpm_megatron.windtunnel.search.findings import evaluate_search
from minicpm_megatron.windtunnel.search.losses import loss_of, rival
from minicpm_megatron.windtunnel.search.propose import propose, seed_of
from minicpm_megatron.windtunnel.search.space import AXES, PAPER, Range, Values
from minicpm_megatron.windtunnel.search.trials import Decided, Trial, read_trials, write_trials
from minicpm_megatron.windtunnel.settings import check_range

KIND = "search"
TRIALS, REPEATS = 40, 3


@dataclass(frozen=True)
class SearchSettings:
    """What is asked for.

    Attributes:
        ranges: name of an axis -> (low, high), searched over the logarithm.
        trials: sets to try, the paper's included.
        repeats: further seeds of the paper's set and of the best of the others.
        seed: of the search; initial weights and data have the recipe's.
        size: (width, layers) of the model; None: the recipe's.
        tokens_per_parameter: length of each run in tokens a parameter (N, embeddings left out); None: the recipe's
            schedule.
    """

    ranges: Mapping[str, Range]
    trials: int = TRIALS
    repeats: int = REPEATS
    seed: int = 1
    size: tuple[int, int] | None = None
    tokens_per_parameter: float | None = None

    def __post_init__(self) -> None:
        for axis in AXES:
            option, given = axis.option, self.ranges[axis.name]
            check_range(option, given)
            what = f"{given[0]:g} to {given[1]:g} leaves the paper's {axis.paper:g} out, which is the first trial"
            require(given[0] <= axis.paper <= given[1], option, what)
        require(self.trials >= 1, "--trials", f"{self.trials} is no number of trials")
        require(self.repeats >= 0, "--repeats", f"{self.repeats} is no number of seeds")
        require(self.seed >= 0, "--seed", f"{self.seed} is below 0")
        per = self.tokens_per_parameter
        require(per is None or 0 < per < math.inf, "--tokens-per-parameter", f"{per} is not positive")


class Search:
    """The cells of a search; a `queue.Source`."""

    def __init__(self, base: Recipe, settings: SearchSettings, output: Path) -> None:
        self.base, self.settings, self.output = base, settings, output
        self._made: dict[str, Cell] = {}  # by name: what is decided never changes

    @property
    def expected(self) -> int:
        """Cells in the end; fewer where the paper's set diverges and is not repeated."""
        return max(self.settings.trials, len(read_trials(self.output).trials)) + 2 * self.settings.repeats

    def cells(self) -> tuple[Cell, ...]:
        """All that are decided, by any process.

        Raises:
            UserError: what is decided cannot be read.
        """
        decided = read_trials(self.output)
        seeds = [self.base.training.seed + offset for offset in range(1, self.settings.repeats + 1)]
        repeats = itertools.product(decided.repeated, seeds)
        return (*self._trials(decided), *(self.cell(n, decided.trials[n].values, seed) for n, seed in repeats))

    def more(self, known: Collection[str]) -> list[Cell]:
        """What others have decided, or one further trial, or at the end the repeats."""
        new = self._unknown(known)
        if new or not self._is_due(read_trials(self.output)):
            return new
        with turn(self.output):
            decided = read_trials(self.output)
            if not self._unknown(known) and self._is_due(decided):  # no other process was the first
                write_trials(self._decide(decided), self.output)
        return self._unknown(known)

    def _unknown(self, known: Collection[str]) -> list[Cell]:
        return [cell for cell in self.cells() if cell.name not in known]

    def _is_due(self, decided: Decided) -> bool:
        return len(decided.trials) < self.settings.trials or self._due_repeats(decided) != set()

    def _due_repeats(self, decided: Decided) -> set[int]:
        """Trials to repeat that are not repeated yet; none before all have ended."""
        cells = self._trials(decided)
        if not self.settings.repeats or any(not _has_ended(cell) for cell in reversed(cells)):
            return set()
        losses = [loss_of(cell) for cell in cells]
        best = rival(losses)
        return set() if best is None or not math.isfinite(losses[0]) else {0, best} - set(decided.repeated)

    def _decide(self, decided: Decided) -> Decided:
        """One trial more, or the repeats."""
        if len(decided.trials) >= self.settings.trials:
            return Decided(decided.trials, (*decided.repeated, *sorted(self._due_repeats(decided))))
        results: dict[int, tuple[Values, float]] = {}
        running = []
        for number, cell in enumerate(self._trials(decided)):
            values = decided.trials[number].values
            if progress.is_done(cell):
                results[number] = (values, loss_of(cell))
            elif progress.failure(cell) is None:
                running.append(values)
        seed = seed_of(self.settings.seed, len(decided.trials))
        values = propose(self.settings.ranges, list(results.values()), running, seed)
        return Decided((*decided.trials, Trial(values, tuple(results))), decided.repeated)

    def _trials(self, decided: Decided) -> list[Cell]:
        return [self.cell(number, trial.values) for number, trial in enumerate(decided.trials)]

    def cell(self, number: int, values: Values, seed: int | None = None) -> Cell:
        """The run of a trial, or its repeat with another seed.

        Raises:
            UserError: the recipe is not valid with these values.
        """
        name = f"trial-{number:03d}" + ("" if seed is None else f"-s{seed}")
        if name not in self._made:
            overrides = {**self._shared, **{axis.key: values[axis.name] for axis in AXES}}
            own = self.base.training.seed if seed is None else seed
            role = "trial" if seed is None else "repeat"
            labels = {"role": role, "number": number, **values, "seed": own}
            self._made[name] = make_cell(self.base, self.output, name, overrides | {"training.seed": own}, labels)
        return self._made[name]

    @cached_property
    def _shared(self) -> dict[str, Any]:
        """Overrides of all cells: muP, whose constants these are, size and length."""
        overrides: dict[str, Any] = {"model.parametrization": "mup"}
        if self.settings.size is not None:
            overrides |= model_of_size(self.base, *self.settings.size)
        if self.settings.tokens_per_parameter is not None:
            cell = make_cell(self.base, self.output, "length", overrides, {})
            overrides["schedule"] = schedule_of_length(self.base, cell, self.settings.tokens_per_parameter)
        return overrides


def _has_ended(cell: Cell) -> bool:
    return progress.is_done(cell) or progress.failure(cell) is not None


def plan_search(base: Recipe, settings: SearchSettings, output: Path) -> Experiment:
    """The search as an experiment whose first cell is the paper's set.

    Raises:
        UserError: a size that does not divide into heads, or a recipe that is not valid with it or at an end of a
            range.
    """
    for end in (0, 1):
        Search(base, settings, output).cell(0, {axis.name: settings.ranges[axis.name][end] for axis in AXES})
    search = Search(base, settings, output)
    first = search.cell(0, PAPER)
    title = (
        f"Bayesian search over {', '.join(axis.name for axis in AXES)} at N = {first.parameters:,} with"
        f" {first.tokens() / first.parameters:.3g} tokens a parameter (section 3.1 of arXiv 2404.06395)"
    )
    ranges = "; ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in settings.ranges.items())
    notes = (
        f"{settings.trials} trials, the first of them the paper's set, over {ranges}",
        f"then {settings.repeats} further seeds of the paper's set and of the best of the others",
    )
    return Experiment(
        KIND,
        title,
        asdict(settings),
        base,
        (first,),
        output,
        evaluate_search,
        notes,
        source=search,
        extendable=frozenset({"trials", "repeats"}),
    )
