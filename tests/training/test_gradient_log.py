"""Steps whose gradients are measured: which they are, after a resume and a skipped step, too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.training.metrics import GRADIENTS, METRICS, read_metrics
from tests.device import on_cuda
from tests.distributed.forked import run_forked
from tests.training import nano

SKIPPED = 9
EVERY = ["logging.gradient_statistics={interval: 1, first_step: 3, last_step: 16}"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gradients")
    recipe = nano.write_recipe(folder)
    broken = {str(8 * (SKIPPED - 1)): "nan loss"}
    cases: list[dict[str, Any]] = [
        nano.case(recipe, "off", ranks=1),
        nano.case(recipe, "every", *EVERY, ranks=1),
        nano.case(recipe, "cut", *EVERY, ranks=1, kill_at=13, kill_rank=0),
        nano.case(recipe, "cut", *EVERY, ranks=1),
    ]
    if not on_cuda():  # the second rank is the one that breaks
        skip = ("logging.gradient_statistics.interval=2", "faults.non_finite=skip")
        cases.append(nano.case(recipe, "skipped", *skip, broken=broken))
    outcomes = run_forked("tests.training.test_faults:worker", cases)
    for number, outcome in enumerate(outcomes):
        if "kill_at" not in cases[number]:
            nano.check(outcome)
    return folder / "runs"


def measured(folder: Path) -> dict[int, dict[str, float]]:
    return {each["step"]: each for each in read_metrics(folder / METRICS, GRADIENTS)}


def test_the_steps_that_were_asked_for_are_measured_and_no_others(runs: Path) -> None:
    assert measured(runs / "off") == {}
    found = measured(runs / "every")
    assert list(found) == list(range(3, 17))
    norms = {each["step"]: each["gradient_norm"] for each in read_metrics(runs / "every" / METRICS)}
    for step, each in found.items():
        assert each["gradient_norm"] == pytest.approx(norms[step], rel=1e-5)
        assert abs(each["gradient_cosine"]) <= 1 and each["max_gradient"] < each["gradient_norm"]
        assert None not in each.values()


def test_measuring_changes_nothing_else(runs: Path) -> None:
    plain, watched = ([each["loss"] for each in read_metrics(runs / name / METRICS)] for name in ("off", "every"))
    assert plain == watched and len(plain) == nano.STEPS


def test_a_killed_run_goes_on_with_the_same_numbers_and_no_gap(runs: Path) -> None:
    assert json.dumps(measured(runs / "cut")) == json.dumps(measured(runs / "every"))


@pytest.mark.cpu_only("two ranks over gloo")
def test_a_skipped_update_is_no_step_to_measure(runs: Path) -> None:
    skipped = [each["step"] for each in read_metrics(runs / "skipped" / METRICS) if each.get("skipped")]
    assert skipped == [SKIPPED]
    assert list(measured(runs / "skipped")) == [2, 4, 6, 10, 12, 14, 16, 18]  # what follows 8 is not finite
