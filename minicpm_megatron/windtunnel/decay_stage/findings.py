"""What section 4.4 says of the decay stage beside what was measured.

A change counts where both comparisons have it: with the steps before the decay, and with the same steps of a run that
does not decay. The first alone could be what training does anyway.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.training.text import number
from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.decay_stage.picture import GRADIENTS, UPDATES, draw_gradients, draw_updates
from minicpm_megatron.windtunnel.decay_stage.series import (
    BLOCKS,
    ENOUGH_SEEDS,
    Around,
    Contrast,
    Quantity,
    compare,
    contrast,
    finished_pairs,
    lag_one,
    logarithm,
    plain,
    positive,
    read_around,
    slope,
)
from minicpm_megatron.windtunnel.decay_stage.updates import (
    BEFORE,
    CONTROL,
    DECAY,
    MatrixUpdate,
    kind_of,
    read_updates,
    write_updates,
)
from minicpm_megatron.windtunnel.experiment import Experiment, Findings
from minicpm_megatron.windtunnel.results import Finding, Picture, Table, Verdict
from minicpm_megatron.windtunnel.verdicts import above, all_of, opposite

UPDATES_CSV = "updates.csv"
A_MAGNITUDE = 10.0  # section 4.4: the curvature "increases by a magnitude"
PROPORTIONAL = 0.5
"""Exponent of the rate above which a quantity is nearer to one that falls with it than to one that does not."""


def evaluate_study(experiment: Experiment) -> Findings:
    """Findings, tables, updates.csv, and figures 7 and 8."""
    runs = read_around(experiment)
    if not runs:
        missing = Finding("Section 4.4", "figures 7 and 8", "no seed has both its runs", "undecided")
        return Findings((missing,), (), ())
    updates = read_updates(experiment)
    write_updates(updates, experiment.output / UPDATES_CSV)
    draw_updates(experiment, runs, updates, experiment.output / UPDATES)
    draw_gradients(runs, experiment.output / GRADIENTS)
    findings = (
        _norm(runs),
        _cosine(runs),
        _first_derivative(runs),
        _second_derivative(runs),
        *_curvature(runs),
        _updates(runs, updates),
        _loss(experiment, runs),
    )
    pictures = (
        Picture(UPDATES, "Largest update of an element from one checkpoint to the next, after figure 7"),
        Picture(GRADIENTS, "Gradients of consecutive steps around the decay, after figure 8"),
    )
    return Findings(findings, (_statistics_table(runs), _updates_table(updates)), pictures)


def _norm(runs: Sequence[Around]) -> Finding:
    found = contrast(runs, logarithm("gradient_norm"))
    return Finding("The gradient norm falls in the decay", "diminishes", _ratios(found), _falls(found))


def _cosine(runs: Sequence[Around]) -> Finding:
    found = contrast(runs, positive("gradient_cosine"), late=False)
    values = contrast(runs, plain("gradient_cosine"), late=False)
    ours = (
        f"positive in {_percent(found.level)} of its steps, {found.before:.0%} before, {found.control:.0%} without"
        f" decay; mean {values.inside:+.3f}, {values.before:+.3f}, {values.control:+.3f}"
    )
    claim = "The cosine of consecutive gradients turns positive in the decay"
    verdicts = (above(found.level, 0.5), above(found.change), above(found.against))
    return Finding(claim, "predominantly positive", ours, all_of(verdicts))


def _first_derivative(runs: Sequence[Around]) -> Finding:
    found = contrast(runs, logarithm("first_derivative"))
    downhill = 1 - contrast(runs, positive("first_derivative"), late=False).inside
    with_rate = slope(runs, logarithm("lr"), logarithm("first_derivative"))
    ours = f"{_ratios(found)}; |D1| ~ rate^{with_rate:.2f} in the decay; negative in {downhill:.0%} of its steps"
    claim = "The first derivative along the update, D1, falls with the rate"
    follows = _where_known(found, with_rate > PROPORTIONAL)
    return Finding(claim, "diminishes exponentially, as the rate does", ours, all_of((_falls(found), follows)))


def _second_derivative(runs: Sequence[Around]) -> Finding:
    found = contrast(runs, logarithm("second_derivative"))
    claim = "The second derivative along the update, D2, grows in magnitude"
    return Finding(claim, "a slight increase", _ratios(found), _rises(found))


def _curvature(runs: Sequence[Around]) -> tuple[Finding, Finding]:
    found = contrast(runs, logarithm("curvature"))
    shorter = contrast(runs, logarithm("update_norm"))
    ours = f"{_ratios(found)}; 1 / |v| alone: {_times(-shorter.change.estimate)} of before"
    # what lies nearer to a factor of ten than to none
    nearest = math.log(A_MAGNITUDE) / 2
    tenfold = all_of((above(found.change, nearest), above(found.against, nearest)))
    return (
        Finding("The curvature on the trajectory rises in the decay", "increases", ours, _rises(found)),
        Finding("It rises by an order of magnitude", f"about {A_MAGNITUDE:.0f} times", _ratios(found), tenfold),
    )


def _updates(runs: Sequence[Around], updates: Sequence[MatrixUpdate]) -> Finding:
    """Means over the matrices of log max update, an interval between checkpoints as a step."""
    taken, falling, related = [], [], []
    for run in runs:
        mine = [each for each in updates if each.seed == run.seed]
        by_window = {
            window: _rows([each for each in mine if each.window == window]) for window in (BEFORE, DECAY, CONTROL)
        }
        late = len(by_window[DECAY]) - max(1, len(by_window[DECAY]) // 2)
        before, inside, control = by_window[BEFORE], by_window[DECAY][late:], by_window[CONTROL][late:]
        taken.append((before.mean(axis=1), inside.mean(axis=1), control.mean(axis=1)))
        falling += list((inside.mean(axis=0) < before.mean(axis=0)) & (inside.mean(axis=0) < control.mean(axis=0)))
        related += list(_with_rate(mine).values())
    found = compare(taken)
    ours = (
        f"{_ratios(found)}; smaller in {sum(falling)} of {len(falling)} matrices; correlation of the logs of update and"
        f" rate {min(related):.2f} or more, median {float(np.median(related)):.2f}"
    )
    claim = "The largest element update between checkpoints follows the rate, in every matrix (figure 7)"
    every = _where_known(found, all(falling))
    return Finding(claim, "a robust correlation with the rate", ours, all_of((_falls(found), every)))


def _rows(updates: Sequence[MatrixUpdate]) -> np.ndarray:
    """log of the largest update, [intervals, matrices]."""
    by_first: dict[int, list[float]] = defaultdict(list)
    for each in updates:
        by_first[each.first].append(math.log(each.largest) if each.largest else math.nan)
    return np.array([by_first[first] for first in sorted(by_first)])


def _with_rate(updates: Sequence[MatrixUpdate]) -> dict[str, float]:
    """Matrix -> correlation of the logs of its updates and of the rate, before and in the decay."""
    by_matrix: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for each in updates:
        if each.window != CONTROL and each.largest:
            by_matrix[each.matrix].append((math.log(each.rate), math.log(each.largest)))
    found = {}
    for matrix, pairs in by_matrix.items():
        rates, sizes = np.array(pairs).T
        level = np.ptp(rates) == 0 or np.ptp(sizes) == 0
        found[matrix] = 0.0 if level else float(np.corrcoef(rates, sizes)[0, 1])
    return found


def _loss(experiment: Experiment, runs: Sequence[Around]) -> Finding:
    found, moved = contrast(runs, plain("loss")), contrast(runs, logarithm("update_norm"))
    ends = [[progress.measured(cell).held_out for cell in pair] for pair in finished_pairs(experiment)]
    stable, decayed = (float(np.mean(each)) for each in zip(*ends, strict=True))
    limits = found.against
    ours = (
        f"training loss {limits.estimate:+.3f}{_limits(limits, '+.3f')} nats a token to the same steps without decay,"
        f" with updates {_times(moved.against.estimate)} as long; held out at the end {decayed:.3f}, without decay"
        f" {stable:.3f}"
    )
    claim = "The loss falls faster in the decay although the weights move less"
    lower, less = opposite(above(limits)), opposite(above(moved.against))
    return Finding(claim, "an accelerated decrease", ours, all_of((lower, less)))


def _rises(found: Contrast) -> Verdict:
    return all_of((above(found.change), above(found.against)))


def _falls(found: Contrast) -> Verdict:
    return all_of((opposite(above(found.change)), opposite(above(found.against))))


def _where_known(found: Contrast, holds: bool) -> Verdict:
    """What a number without limits of its own says: nothing where not even the contrast has limits."""
    return bool(holds) if found.change.is_bounded and found.against.is_bounded else "undecided"


def _ratios(found: Contrast) -> str:
    before, without = (f"{_times(each.estimate)}{_limits(each)}" for each in (found.change, found.against))
    return f"second half of the decay to before {before}, to the same steps without decay {without}"


def _times(log_ratio: float) -> str:
    return f"x{math.exp(log_ratio):.2f}" if abs(log_ratio) < 5 else f"x{math.exp(log_ratio):.2g}"


def _limits(limits: Interval, form: str = "") -> str:
    if not limits.is_bounded:
        return " (limits not known)"
    low, high = ((f"{each:{form}}" if form else _times(each)) for each in (limits.low, limits.high))
    return f" ({low} to {high})"


def _percent(limits: Interval) -> str:
    if not limits.is_bounded:
        return f"{limits.estimate:.0%}"
    return f"{limits.estimate:.0%} ({max(0.0, limits.low):.0%} to {min(1.0, limits.high):.0%})"


ROWS: tuple[tuple[str, Quantity, bool], ...] = (  # name, quantity, whether it is a log
    ("gradient norm", logarithm("gradient_norm"), True),
    ("largest gradient", logarithm("max_gradient"), True),
    ("cosine", plain("gradient_cosine"), False),
    ("cosine above 0", positive("gradient_cosine"), False),
    ("D1", plain("first_derivative"), False),
    ("|D1|", logarithm("first_derivative"), True),
    ("|D2|", logarithm("second_derivative"), True),
    ("curvature", logarithm("curvature"), True),
    ("update norm", logarithm("update_norm"), True),
    ("training loss", plain("loss"), False),
)


def _statistics_table(runs: Sequence[Around]) -> Table:
    rows = []
    for name, quantity, is_log in ROWS:
        windows: dict[str, list[float]] = defaultdict(list)
        correlation = []
        for run in runs:
            late = run.decay["step"] > run.middle
            inside, without = quantity(run.decay), quantity(run.control)
            windows["before"] += list(quantity(run.before))
            windows["first"] += list(inside[~late])
            windows["second"] += list(inside[late])
            windows["control"] += list(without[late])
            correlation.append(lag_one((inside - without)[late]))
        means = [float(np.nanmean(values)) for values in windows.values()]
        shown = [number(math.exp(mean) if is_log else mean) for mean in means]
        rows.append((name, *shown, number(float(np.mean(correlation)), 2)))
    steps = sum(int((run.decay["step"] > run.middle).sum()) for run in runs) // len(runs)
    how = (
        f"limits from {len(runs)} seeds"
        if len(runs) >= ENOUGH_SEEDS
        else f"limits from {BLOCKS} blocks of {steps} steps"
    )
    columns = ("", "before", "decay, 1st half", "decay, 2nd half", "2nd half without decay", "correlation of steps")
    return Table(f"Means (of |D1|, norms and the like geometric); {how}", columns, tuple(rows))


def _updates_table(updates: Sequence[MatrixUpdate]) -> Table:
    """Matrices of one kind over all layers and seeds, the last interval of each window."""
    last = {window: max(each.last for each in updates if each.window == window) for window in (BEFORE, DECAY, CONTROL)}
    by_kind: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for each in updates:
        if each.last == last[each.window]:
            by_kind[kind_of(each.matrix)][each.window].append(each.largest)
    rows = []
    for kind, windows in sorted(by_kind.items()):
        values = [windows[window] for window in (BEFORE, DECAY, CONTROL)]
        rows.append((kind, str(len(values[0])), *(f"{min(each):.3g} to {max(each):.3g}" for each in values)))
    columns = ("matrices", "of them", "before", "end of the decay", "without decay")
    return Table("Largest update of an element between two checkpoints, least to greatest", columns, tuple(rows))
