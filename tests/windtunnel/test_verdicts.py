"""A verdict says no more than the limits that stand beside it."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.windtunnel.rates.sweep import plan_rates
from minicpm_megatron.windtunnel.verdicts import above, all_of, at_most, below, holds, within
from tests.windtunnel.pretended import base, pretend
from tests.windtunnel.test_rates import SETTINGS

UNKNOWN = [
    Interval(0.0, 191.0, math.inf),
    Interval(-math.inf, 191.0, math.inf),
    Interval(math.nan, 191.0, math.nan),
]


@pytest.mark.parametrize("limits", UNKNOWN)
def test_limits_that_say_nothing_are_undecided(limits: Interval) -> None:
    assert holds(limits, 20.0) == holds(limits, 191.0) == holds(limits, -1.0) == "undecided"
    assert within(limits, 1.0, 2.0) == within(limits, 190.0, 192.0) == "undecided"
    assert above(limits, 20.0) == at_most(limits, 20.0) == below(limits, Interval(1.0, 2.0, 3.0)) == "undecided"


def test_limits_that_say_something() -> None:
    limits = Interval(1.0, 2.0, 3.0)
    assert (holds(limits, 2.5), holds(limits, 3.5)) == (True, False)
    assert (within(limits, 0.0, 4.0), within(limits, 4.0, 5.0), within(limits, 0.0, 2.0)) == (True, False, "undecided")
    other = Interval(3.5, 4.0, 5.0)
    assert (below(limits, other), below(other, limits), below(limits, limits)) == (True, False, "undecided")
    assert all_of([True, "undecided"]) == "undecided"


def test_best_rates_behind_noise_neither_agree_nor_disagree(tmp_path: Path) -> None:
    """Minima three octaves off, of parabolas that the noise of the seeds hides."""
    noisy = plan_rates(base(tmp_path), SETTINGS, tmp_path / "noisy")
    for cell in noisy.cells:
        away = math.log2(cell.labels["rate"] / (0.02 if cell.labels["parametrization"] == "mup" else 0.0008))
        pretend(cell, 2 + 0.01 * away**2 + (0.5 if cell.labels["seed"] == 1 else -0.5) * math.cos(7 * away))
    found = noisy.results().findings
    assert {finding.agrees for finding in found} == {"undecided"}, found
    assert "limits not known" in found[0].ours


def test_the_best_rate_of_a_single_run_has_limits_by_its_parabola_alone(tmp_path: Path) -> None:
    """Three rates and one seed: a parabola goes through them exactly, and nothing says how far off it is."""
    settings = replace(SETTINGS, rates=(0.005, 0.01, 0.02), seeds=(1,), parametrizations=("mup",))
    single = plan_rates(base(tmp_path), settings, tmp_path / "single")
    for cell in single.cells:
        pretend(cell, 2 + 0.1 * math.log2(cell.labels["rate"] / 0.011) ** 2)
    for finding in single.results().findings:
        assert "limits not known" in finding.ours and finding.agrees == "undecided", finding


PAGE = Path(__file__).resolve().parents[2] / "docs" / "windtunnel-cpu" / "report.md"


def test_no_claim_of_the_report_agrees_without_limits() -> None:
    rows = re.findall(r"^\| [\w-]+ \|.*\| (agrees|disagrees|undecided) \|$", PAGE.read_text(encoding="utf-8"), re.M)
    assert len(rows) == 32
    for line in PAGE.read_text(encoding="utf-8").splitlines():
        assert not ("limits not known" in line and line.endswith("| agrees |")), line
