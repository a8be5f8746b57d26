"""What a search tells: whether anything beats the paper's set, where it stands, and which of the values matter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.importance import Importances, importances
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.noise import noise_of
from minicpm_megatron.windtunnel.results import Finding, Picture, Table, Verdict
from minicpm_megatron.windtunnel.search.losses import Result, read_results_of, rival
from minicpm_megatron.windtunnel.search.picture import PICTURE, draw_search
from minicpm_megatron.windtunnel.search.space import AXES, PAPER, Range, Values, position
from minicpm_megatron.windtunnel.verdicts import EQUAL, at_most

BELIEVED = 0.5
"""Q^2 of the fitted surface below which shares of its variance are not told: ours, it predicts less than half."""
WORST_SHARE = 0.25
"""Of the trials, whose losses count as the least of them for the importances: ours. What matters is where the loss is
low, and the worst sets lie so far above that a surface would be one through them."""
BEST_SHARE = 0.25  # of the trials whose values are shown as those of the best


@dataclass(frozen=True)
class Searched:
    """All that is known.

    Attributes:
        results: every trial, by number; the first is the paper's set.
        best: number of the best of the others; None where none has a loss.
        difference: paper's less best's, over seeds that had no part in the choice; None where there are none.
        importances: of the axes, in their order; None where they are not known, and `why` says why.
    """

    results: tuple[Result, ...]
    best: int | None
    difference: Interval | None
    importances: Importances | None
    why: str = ""

    @property
    def paper(self) -> Result:
        """The paper's set."""
        return self.results[0]

    @property
    def ended(self) -> list[Result]:
        """Trials with a result, the best first, those that diverged last."""
        return sorted((each for each in self.results if not math.isnan(each.loss)), key=lambda each: each.loss)

    def rank(self, result: Result) -> str:
        """As "3 of 40"."""
        better = sum(each.loss < result.loss for each in self.ended)
        return "-" if math.isnan(result.loss) else f"{better + 1} of {len(self.ended)}"


def read_search(experiment: Experiment) -> Searched:
    """What the cells tell."""
    results = read_results_of(experiment)
    best = rival([each.loss for each in results])
    ranges = {name: tuple(limits) for name, limits in experiment.settings["ranges"].items()}
    found, why = _importances(results, ranges)
    difference = None if best is None else _difference(results[0], results[best])
    return Searched(tuple(results), best, difference, found, why)


def _importances(results: Sequence[Result], ranges: dict[str, Range]) -> tuple[Importances | None, str]:
    """The worst quarter, runs that diverged among them, counts as the least loss there."""
    ended = [each for each in results if not math.isnan(each.loss)]
    points = [[position(each.values[axis.name], ranges[axis.name]) for axis in AXES] for each in ended]
    losses = sorted(each.loss for each in ended)
    finite = [loss for loss in losses if math.isfinite(loss)]
    worst = losses[math.floor((1 - WORST_SHARE) * len(losses)) :]
    highest = min([*worst, *finite[-1:]], default=0.0)  # the highest finite loss where more than these diverged
    try:
        found = importances(np.reshape(points, (-1, len(AXES))), [min(each.loss, highest) for each in ended])
    except UserError as error:
        return None, error.what
    if found.predicted < BELIEVED:
        return None, f"parabolas predict {found.predicted:.2f} of the losses' variance, {BELIEVED:g} is asked for"
    return found, ""


def _difference(paper: Result, best: Result) -> Interval | None:
    """From seeds that both have, the search's own left out: best was chosen by it."""
    seeds = sorted(set(paper.repeats) & set(best.repeats))
    losses = np.array([[each.repeats[seed] for seed in seeds] for each in (paper, best)])
    if not seeds or not np.isfinite(losses).all():
        return None
    return noise_of(losses).difference(*(float(mean) for mean in losses.mean(axis=1)))


def evaluate_search(experiment: Experiment) -> Findings:
    """The finding, the tables and the picture."""
    searched = read_search(experiment)
    ranges = {name: tuple(limits) for name, limits in experiment.settings["ranges"].items()}
    draw_search(searched, ranges, experiment.output / PICTURE)
    caption = "Validation loss of every trial, and over each of the values; the paper's values and the best"
    tables = (_best(searched), *_repeats(searched), _all(searched))
    return Findings((_nothing_better(searched),), tables, (Picture(PICTURE, caption),))


def _nothing_better(searched: Searched) -> Finding:
    claim = (
        "A Bayesian search on 9M parameters with 10 tokens each ends at the paper's set: no other is better by"
        f" {EQUAL:.1%} of the loss (section 3.1, appendix A.1)"
    )
    verdict: Verdict = "undecided"
    paper, limits = searched.paper, searched.difference
    told = f"the paper's {_loss(paper.loss)}, rank {searched.rank(paper)}"
    if searched.best is None:
        ours = f"{told}; no other trial has a loss"
    else:
        best = searched.results[searched.best]
        ours = f"{told}; the best other {_values(best.values)}: {_loss(best.loss)}; {_limits(searched)}"
        if math.isinf(paper.loss):
            verdict = False
        elif limits is not None:
            verdict = at_most(limits, EQUAL * float(np.mean(list(best.repeats.values()))))
    return Finding(claim, _values(PAPER), ours, verdict)


def _limits(searched: Searched) -> str:
    limits = searched.difference
    if limits is None:
        return "paper's less best's not known without repeats of both"
    told = f"paper's less best's over other seeds {limits.estimate:+.4f}"
    return f"{told} ({limits.low:+.4f} to {limits.high:+.4f})" if limits.is_bounded else f"{told} (one seed)"


def _best(searched: Searched) -> Table:
    rows = [("the paper's", *_row(searched, searched.paper))]
    if searched.best is not None:
        rows.append(("best of the others", *_row(searched, searched.results[searched.best])))
    finite = [each for each in searched.ended if math.isfinite(each.loss)]
    best = finite[: math.ceil(BEST_SHARE * len(finite))]
    if best:
        spans = [[each.values[axis.name] for each in best] for axis in AXES]
        texts = [f"{min(span):.3g} to {max(span):.3g}" for span in spans]
        rows.append((f"best {BEST_SHARE:.0%}", *texts, f"{_loss(best[0].loss)} to {_loss(best[-1].loss)}", ""))
    if searched.importances is None:
        title = f"The best sets; importances not known: {searched.why}"
    else:
        rows.append(("importance", *(f"{share:.0%}" for share in searched.importances.shares), "", ""))
        title = (
            "The best sets, and the importance of each value: its share in the loss's variance over the ranges, by"
            f" parabolas that predict {searched.importances.predicted:.2f} of it (Q^2)"
        )
    columns = ("", *(axis.name for axis in AXES), "held-out loss", "rank")
    return Table(title, columns, tuple(rows))


def _row(searched: Searched, result: Result) -> tuple[str, ...]:
    values = (f"{result.values[axis.name]:g}" for axis in AXES)
    return (*values, _loss(result.loss), searched.rank(result))


def _repeats(searched: Searched) -> tuple[Table, ...]:
    pair = [searched.paper] + ([] if searched.best is None else [searched.results[searched.best]])
    seeds = sorted({seed for each in pair for seed in each.repeats})
    if not seeds:
        return ()
    rows = []
    for name, each in zip(("the paper's", "best of the others"), pair, strict=False):
        losses = [each.repeats.get(seed, math.nan) for seed in seeds]
        rows.append((name, *(_loss(loss) for loss in losses), _loss(float(np.mean(losses)))))
    columns = ("", *(f"seed {seed}" for seed in seeds), "mean")
    return (Table(f"With other seeds; {_limits(searched)}", columns, tuple(rows)),)


def _all(searched: Searched) -> Table:
    columns = ("trial", *(axis.name for axis in AXES), "held-out loss", "rank")
    rows = tuple((str(each.number), *_row(searched, each)) for each in searched.results)
    return Table("Every trial", columns, rows)


def _values(values: Values) -> str:
    return ", ".join(f"{axis.name} {values[axis.name]:g}" for axis in AXES)


def _loss(value: float) -> str:
    return "-" if math.isnan(value) else "diverged" if math.isinf(value) else f"{value:.4f}"
