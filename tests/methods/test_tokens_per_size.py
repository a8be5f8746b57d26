"""Where curves of several sizes meet, on curves whose answer is known in closed form or by a root."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.optimize import brentq

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.scaling_law import PUBLISHED as LAWS
from minicpm_megatron.methods.tokens_per_size import PUBLISHED, Crossing, FilledCurve, crossings

SIZES = (0.1e9, 0.3e9, 1e9, 3e9)
LAW = LAWS["average"].law
TOKENS = np.geomspace(1e9, 3e12, 400)


def loss_of(n: float, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(LAW.loss(n / 1e9, tokens / 1e9))


def known(small: float, large: float) -> float:
    """FLOPs at which the law gives both sizes the same loss."""

    def difference(log_compute: float) -> float:
        at = np.exp(log_compute)
        return float(loss_of(large, at / 6 / large) - loss_of(small, at / 6 / small))

    return math.exp(brentq(difference, math.log(1e18), math.log(1e26), xtol=1e-12))


def test_crossings_of_a_law_are_where_a_root_finder_sees_them() -> None:
    found = crossings({n: (TOKENS, loss_of(n, TOKENS)) for n in reversed(SIZES)})
    assert [(each.smaller, each.larger) for each in found] == list(zip(SIZES, SIZES[1:], strict=False))
    for each in found:
        assert each.compute == pytest.approx(known(each.smaller, each.larger), rel=1e-3)
        assert each.tokens_per_parameter == pytest.approx(each.compute / 6 / each.smaller**2)
        assert each.loss == pytest.approx(float(loss_of(each.smaller, each.compute / 6 / each.smaller)), rel=1e-5)


LLAMA, MEET = (13e9, 34e9, 70e9), (1e23, 5e23)


def straight_lines(hump: float) -> dict[float, tuple[np.ndarray, np.ndarray]]:
    """Curves of Llama 2's sizes, straight in log-log, that meet where section 4.5 says; and what a cosine adds to them.

    Args:
        hump: height, relative, of what is added in the last two decades of a run.
    """
    slopes, logs = (-0.05, -0.08, -0.12), np.log(np.geomspace(1e22, 3e24, 400))
    away = np.clip((logs - logs[-1]) / math.log(10) / 2 + 1, 0, 1)
    level, lines = 0.6, {}
    for place, (n, slope) in enumerate(zip(LLAMA, slopes, strict=True)):
        if place:
            level += (slopes[place - 1] - slope) * math.log(MEET[place - 1])
        # each size has another one, or the humps would move no crossing
        added = hump * (place + 1) * np.sin(np.pi * away)
        lines[n] = (np.exp(logs) / 6 / n, np.exp(level + slope * logs + added))
    return lines


def crossings_as_they_are(lines: dict[float, tuple[np.ndarray, np.ndarray]]) -> list[float]:
    """Compute at the last crossing of each pair of curves that nothing was filled in."""
    compute = 6 * LLAMA[0] * lines[LLAMA[0]][0]
    losses = [loss for _, loss in lines.values()]
    return [float(compute[np.flatnonzero(b > a)[-1]]) for a, b in zip(losses, losses[1:], strict=False)]


@pytest.mark.parametrize("hump", [0.0, 0.02])
def test_the_papers_numbers_for_llama_2(hump: float) -> None:
    """What a cosine adds in the middle is filled exactly where the curves are straight."""
    lines = straight_lines(hump)
    if hump:
        moved = np.array(crossings_as_they_are(lines)) / MEET
        assert (np.abs(np.log(moved)) > 0.2).all(), "there is nothing to fill"
    found = crossings(lines)
    assert [each.compute for each in found] == pytest.approx(MEET, rel=1e-3)
    ratios = sorted(each.tokens_per_parameter for each in found)
    assert ratios == pytest.approx([5e5 / 6 / 34**2, 1e5 / 6 / 13**2], rel=1e-3)  # EFLOPs over billions squared
    assert [round(ratio, -1) for ratio in ratios] == list(PUBLISHED)


def test_a_straight_line_above_a_curve_lets_the_larger_take_over_early() -> None:
    """Humps over the last half decade of runs that follow the law; the crossings lie in it."""
    ends = {n: 3 * known(n, 3 * n) / 6 / n for n in SIZES}
    sagging = {}
    for n, end in ends.items():
        tokens = np.geomspace(end / 1000, end, 400)
        hump = np.sin(np.pi * np.clip(2 * np.log10(tokens / end) + 1, 0, 1))
        sagging[n] = (tokens, loss_of(n, tokens) + 0.01 * hump)
    exact = [known(*pair) for pair in zip(SIZES, SIZES[1:], strict=False)]
    for each, truth in zip(crossings(sagging), exact, strict=True):
        assert 0.8 * truth < each.compute < truth


def test_curves_that_do_not_meet_are_left_out() -> None:
    short = np.geomspace(1e9, 1e10, 50)  # too few tokens for the larger one to take over
    assert crossings({n: (short, loss_of(n, short)) for n in (1e9, 3e9)}) == []


@pytest.mark.parametrize(
    ("curves", "line"),
    [
        ({1e9: ([1.0, 2.0], [3.0, 2.0])}, "curves: 1 sizes have no next larger one"),
        ({1e9: ([1.0, 2.0], [3.0, 2.0]), 2e9: ([1.0], [3.0])}, "2000000000 parameters: the losses are no curve"),
        ({1e9: ([1.0, 2.0], [3.0, 4.0]), 2e9: ([1.0, 2.0], [3.0, 2.0])}, "1000000000 parameters: the losses are no"),
        ({1e9: ([1.0, 2.0], [3.0]), 2e9: ([1.0, 2.0], [3.0, 2.0])}, "compute and loss: shapes"),
        ({1e9: ([1.0, -2.0], [3.0, 2.0]), 2e9: ([1.0, 2.0], [3.0, 2.0])}, "compute: has a value that is not positive"),
        ({0.0: ([1.0, 2.0], [3.0, 2.0]), 2e9: ([1.0, 2.0], [3.0, 2.0])}, "0 is no number of parameters"),
    ],
)
def test_refused(curves: dict[float, tuple[list[float], list[float]]], line: str) -> None:
    with pytest.raises(UserError, match=line):
        crossings(curves)


def test_a_filled_curve_never_lies_above_its_points() -> None:
    tokens = np.geomspace(1e9, 1e12, 50)
    loss = loss_of(1e9, tokens) + 0.02 * np.random.default_rng(0).standard_normal(50)
    filled = FilledCurve.of(1e9, (tokens, loss))
    inside = (6e9 * tokens >= filled.compute[0]) & (6e9 * tokens <= filled.compute[-1])
    assert (filled.log_loss(np.log(6e9 * tokens[inside])) <= np.log(loss[inside]) + 1e-12).all()
    assert Crossing(1e9, 2e9, 6e20, 3.0).tokens_per_parameter == 100
