"""Optima and shifts from losses whose optimum is known."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from minicpm_megatron.windtunnel.rates.sweep import RateSettings, plan_rates, read_sweeps, shift_of
from minicpm_megatron.windtunnel.report.markdown import format_markdown
from minicpm_megatron.windtunnel.results import format_results, read_results, write_results
from tests.pictures import drawn, legend_of
from tests.windtunnel.pretended import base, pretend

SETTINGS = RateSettings(
    sizes=((32, 2), (64, 4), (128, 6)),
    rates=(0.0025, 0.005, 0.01, 0.02, 0.04),
    standard_rates=(0.0001, 0.0002, 0.0004, 0.0008, 0.0016, 0.0032),
    parametrizations=("mup", "standard"),
    seeds=(1, 2),
)
SLOPES = {"mup": 0.02, "standard": -0.4}


def known_best(parametrization: str, parameters: int) -> float:
    first = {"mup": 0.011, "standard": 0.0012}[parametrization]
    return first * (parameters / 22_000) ** SLOPES[parametrization]


@pytest.fixture
def experiment(tmp_path: Path):
    found = plan_rates(base(tmp_path), SETTINGS, tmp_path / "out")
    for cell in found.cells:
        labels = cell.labels
        away = math.log2(labels["rate"] / known_best(labels["parametrization"], cell.parameters))
        # the same shift for all rates of a seed moves no minimum
        pretend(cell, 2 + 0.1 * away**2 + 0.001 * labels["seed"])
    return found


def test_optima_and_shift_are_found(experiment) -> None:
    sweeps = read_sweeps(experiment)
    for sweep in sweeps:
        assert sweep.optimum is not None
        assert sweep.optimum.rate == pytest.approx(known_best(sweep.parametrization, sweep.parameters), rel=1e-6)
    for name, slope in SLOPES.items():
        group = [sweep for sweep in sweeps if sweep.parametrization == name]
        shift = shift_of(group)
        assert shift is not None and shift.slope == pytest.approx(slope, abs=1e-6)
        logs = np.log2([[each.parameters, each.optimum.rate] for each in group if each.optimum]).T
        assert shift.slope == pytest.approx(np.polyfit(*logs, 1)[0])


def test_the_findings_agree_and_are_read_again(experiment) -> None:
    with drawn() as figures:
        results = experiment.results()
    assert [finding.agrees for finding in results.findings] == [True, True, True]
    [figure] = figures
    # 2^0.02 and 2^-0.4
    told = [axis.get_title().splitlines()[1] for axis in figure.axes]
    assert told == [f"twice the parameters: best learning rate times {times}" for times in ("1.01", "0.76")]
    assert {"one seed", "parabola near the minimum", "its minimum"} <= set(legend_of(figure.axes[1]))
    write_results(results, experiment.output)
    again = read_results(experiment.output)
    assert again.findings == results.findings and again.tables == results.tables
    assert {cell["state"] for cell in again.cells} == {"done"}
    text = format_results(again, experiment.output)
    assert "slope +0.020" in text and "DISAGREES" not in text
    page = format_markdown([(experiment.output, again)], experiment.output.parent)
    assert "![" in page and "](out/rates.png)" in page and (experiment.output / "rates.png").exists()


def test_what_the_grid_does_not_enclose_is_undecided_and_a_moving_optimum_disagrees(tmp_path: Path) -> None:
    edge = plan_rates(base(tmp_path), SETTINGS, tmp_path / "edge")
    for cell in edge.cells:
        pretend(cell, 2 - cell.labels["rate"])
    assert {finding.agrees for finding in edge.results().findings} == {"undecided"}
    moving = plan_rates(base(tmp_path), SETTINGS, tmp_path / "moving")
    for cell in moving.cells:
        best = {32: 0.02, 64: 0.01, 128: 0.004}[cell.labels["width"]] / (
            1 if cell.labels["parametrization"] == "mup" else 10
        )
        pretend(cell, 2 + 0.1 * math.log2(cell.labels["rate"] / best) ** 2 + 0.001 * cell.labels["seed"])
    near, shift, _ = moving.results().findings
    assert (near.agrees, shift.agrees) == (False, False)
    (tmp_path / "empty").mkdir()
    empty = plan_rates(base(tmp_path), SETTINGS, tmp_path / "empty").results()
    assert {cell["state"] for cell in empty.cells} == {"missing"}
    assert {finding.agrees for finding in empty.findings} == {"undecided"}
