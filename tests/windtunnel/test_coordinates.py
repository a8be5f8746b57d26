"""The coordinate check as a command on real tokens, and its verdicts on sizes that are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.windtunnel.coordinates.check import (
    COORDINATES,
    CoordinateSettings,
    averaged,
    collect,
    plan_coordinates,
    slopes_of,
)
from minicpm_megatron.windtunnel.coordinates.measure import QUANTITIES
from minicpm_megatron.windtunnel.results import read_results
from tests.cli.commands import command, error_lines, tree
from tests.pictures import drawn
from tests.windtunnel.pretended import base, pretend

SETTINGS = CoordinateSettings(widths=(32, 64, 128), layers=2, depths=(2, 4, 8), width=32, steps=3, seeds=(1, 2))
COMMAND = ["coord-check", "--recipe", "recipe.yaml", "--output", "out", "--steps", "2"]
SMALL = ["--widths", "32,64", "--layers", "1", "--depths", "1,2", "--width", "32"]


def pretended(folder: Path, slopes: dict[str, float]):
    """Sizes that follow power laws: end slopes over width by parametrisation, half of them at the start."""
    experiment = plan_coordinates(base(folder), SETTINGS, folder / "out")
    for cell in experiment.cells:
        labels = cell.labels
        size = labels["width"] if labels["over"] == "width" else labels["layers"]
        steep = slopes[labels["parametrization"]]
        start = 0.0 if labels["over"] == "depth" else steep / 2
        powers = {"start": start, "end": steep, "change": steep}
        pretend(cell, {})
        # the seeds lie around the power law
        height = 1.01 ** (2 * labels["seed"] - 3)
        values = {when: {name: height * size**power for name in QUANTITIES} for when, power in powers.items()}
        write_json(cell.folder / COORDINATES, values)
    return experiment


@pytest.mark.parametrize(
    ("slopes", "verdicts"),
    [
        ({"mup": 0.02, "standard": 1.0}, [True, True, True]),
        ({"mup": 0.5, "standard": 0.1}, [False, False, False]),
        ({"mup": -0.4, "standard": -1.0}, [False, True, False]),
    ],
)
def test_verdicts(tmp_path: Path, slopes: dict[str, float], verdicts: list[bool]) -> None:
    experiment = pretended(tmp_path, slopes)
    with drawn() as figures:
        assert [finding.agrees for finding in experiment.results().findings] == verdicts
    meanings = [text.get_text() for text in figures[0].legends[0].get_texts()]
    assert meanings == ["at the start", "after the steps", "the change between"]
    points = collect(experiment)
    for (name, over, when, _), limits in slopes_of(points).items():
        half = {"start": 0.5 if over == "width" else 0.0}.get(when, 1.0)
        assert limits.estimate == pytest.approx(half * slopes[name]) and limits.estimate in limits
    line = points["mup", "width", "end", "logits"]
    assert len(line) == 6
    logs = np.log(np.array(line)).T
    assert slopes_of(points)["mup", "width", "end", "logits"].estimate == pytest.approx(np.polyfit(*logs, 1)[0])
    means = averaged(line)
    assert [value for _, value in means] == pytest.approx([size ** slopes["mup"] for size, _ in means])


def test_what_was_not_finite_is_undecided(tmp_path: Path) -> None:
    experiment = pretended(tmp_path, {"mup": 0.02, "standard": 1.0})
    for cell in experiment.cells:
        if cell.labels["width"] == 128:
            content = json.loads((cell.folder / COORDINATES).read_text())
            write_json(cell.folder / COORDINATES, content | {"end": dict.fromkeys(QUANTITIES)})
    assert [finding.agrees for finding in experiment.results().findings] == ["undecided", "undecided", True]
    assert math.isnan(averaged([(1, math.nan), (1, 2.0)])[0][1])


def test_the_command_on_real_tokens(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("windtunnel.py", *COMMAND, *SMALL) == 0
    assert "mup-width-32x1-s1: logits" in capsys.readouterr().out
    results = read_results(here / "out")
    assert {cell["state"] for cell in results.cells} == {"done"} and len(results.cells) == 8
    found = json.loads((here / "out" / "cells" / "mup-width-64x1-s1" / COORDINATES).read_text())
    # embeddings have a standard deviation of 0.1 and are multiplied by 12; blocks add little at the start
    assert found["start"]["residual"] == pytest.approx(1.2, rel=0.05)
    assert all(value > 0 for sizes in found.values() for value in sizes.values())
    # a case that is missing is measured again, the others stay
    again = here / "out" / "cells" / "mup-width-32x1-s1"
    before = (again / COORDINATES).read_bytes()
    (again / "done.json").unlink()
    assert command("windtunnel.py", *COMMAND, *SMALL) == 0
    told = capsys.readouterr().out
    assert told.count(": logits") == 1 and (again / COORDINATES).read_bytes() == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--widths", "32"], "--widths: not two or more different sizes"),
        (["--widths", "32,40", "--depths", ""], "40 does not divide into heads of 16"),
        (["--widths", "", "--depths", ""], "nothing to compare"),
        (["--depths", "0,2"], "--depths: not all above 0"),
        (["--steps", "0"], "--steps: 0 is not above 0"),
        (["parallel.tensor_model_parallel_size=2"], "parallel: the check runs in one process"),
    ],
)
def test_each_mistake_is_one_line(more: list[str], message: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    capfd.readouterr()
    assert command("windtunnel.py", *COMMAND, *SMALL, *more) == 2
    [line] = error_lines(capfd.readouterr().err)
    assert message in line and tree(here) == before
