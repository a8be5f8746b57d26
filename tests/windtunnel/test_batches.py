"""The plan of runs at several batch sizes, and the law found from losses that follow a known one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minicpm_megatron.methods.batch_size_law import PUBLISHED, BatchSizeLaw
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import BatchPlan
from minicpm_megatron.windtunnel.batches import findings
from minicpm_megatron.windtunnel.batches.findings import Reading, read_runs
from minicpm_megatron.windtunnel.batches.picture import CONTOURS, LAW
from minicpm_megatron.windtunnel.batches.runs import BatchSettings, plan_batches
from tests.pictures import drawn, legend_of
from tests.windtunnel.pretended import base, pretend

BATCHES = (128, 256, 512, 1024, 2048, 4096)
SETTINGS = BatchSettings(
    sizes=((32, 2), (64, 4), (128, 6)), batches=BATCHES, seeds=(1,), tokens=400_000, evaluations=50
)
KNOWN = BatchSizeLaw(2.0e6, 6.24)  # between 256 and 2,048 tokens for losses of 4.2 to 3
MANY = 10_000  # held-out samples


def tokens_needed(parameters: int, batch: int, loss: np.ndarray, law: BatchSizeLaw) -> np.ndarray:
    """Least at the law's batch, a parabola in log-log around it; larger models are ahead."""
    least = 60_000 * np.exp(2.0 * (3.9 - 0.08 * math.log(parameters / 24_000) - loss))
    return least * np.exp(0.12 * (math.log(batch) - np.log(law.a / loss**law.b)) ** 2)


def pretend_all(experiment, law_of=lambda cell: KNOWN, noise: float = 0.0) -> None:
    chance = np.random.default_rng(1)
    for cell in experiment.cells:
        batch, plan = cell.labels["batch_tokens"], BatchPlan(cell.recipe)
        loss = np.linspace(8, 2.2, 4000)
        needed = tokens_needed(cell.parameters, batch, loss, law_of(cell)) * math.exp(noise * chance.normal())
        assert (np.diff(needed) > 0).all()
        steps = range(cell.recipe.evaluation.interval, cell.last_step + 1, cell.recipe.evaluation.interval)
        pretend(cell, {step: float(np.interp(plan.tokens(step), needed, loss)) for step in steps})


def plan(folder: Path, settings: BatchSettings = SETTINGS, reading: Reading | None = None, **sections):
    return plan_batches(base(folder, **sections), settings, reading or Reading(), folder / "out", MANY)


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take longer than all the rest, and one test looks at them."""
    for name in ("draw_contours", "draw_law"):
        monkeypatch.setattr(findings, name, lambda *_: None)


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_all_runs_see_the_same_tokens_rate_and_held_out_text(tmp_path: Path, unit: str) -> None:
    lengths = {key: value * (1 if unit == "steps" else 128) for key, value in {"warmup": 10, "total": 400}.items()}
    experiment = plan(tmp_path, schedule={"unit": unit, **lengths})
    assert len(experiment.cells) == 3 * 6 and len({cell.tokens() for cell in experiment.cells}) == 1
    assert experiment.cells[0].tokens() >= SETTINGS.tokens
    at, read = set(), set()
    for cell in experiment.cells:
        recipe, tokens = cell.recipe, BatchPlan(cell.recipe)
        assert tokens.tokens(1) == cell.labels["batch_tokens"]
        assert cell.last_step % recipe.evaluation.interval == 0
        interval = recipe.evaluation.interval
        at.add(tuple(tokens.tokens(step) for step in range(interval, cell.last_step + 1, interval)))
        read.add(recipe.evaluation.batches * recipe.training.global_batch_size)
        schedule = build_schedule(recipe.schedule)
        assert schedule.factor(10 * 128) == schedule.factor(cell.tokens()) == 1 and schedule.factor(5 * 128) == 0.5
    assert len(at) == 1 and 40 <= len(at.pop()) <= 50
    assert read == {128}  # the recipe's 8 batches of 4 samples, up to whole batches of 128
    # a smaller set is read to its end by every run
    for there, asked in ((127, 8), (300, 999), (300, None)):
        less = plan_batches(base(tmp_path, evaluation={"batches": asked}), SETTINGS, Reading(), tmp_path / "out", there)
        recipes = [each.recipe for each in less.cells]
        assert {min(r.evaluation.batches * r.training.global_batch_size, there) for r in recipes} == {there}
        assert f" evaluations on {there} samples a set" in less.notes[0]


def test_the_papers_arm_is_a_cosine_over_the_whole_run(tmp_path: Path) -> None:
    experiment = plan(tmp_path, replace(SETTINGS, schedule="cosine"))
    for cell in experiment.cells:
        schedule, warmup = build_schedule(cell.recipe.schedule), cell.recipe.schedule.warmup
        assert schedule.factor(warmup / 2) == 0.5
        # appendix B.1: 0.9 (1 + cos(pi s / T)) / 2 + 0.1
        for share in (0.25, 0.5, 1.0):
            expected = 0.9 * (1 + math.cos(math.pi * share)) / 2 + 0.1
            assert schedule.factor(share * cell.tokens()) == pytest.approx(expected, rel=1e-6)
    assert "under a cosine learning rate" in experiment.notes[0]
    pretend_all(experiment)
    assert read_runs(experiment, Reading()).law is not None


def test_a_known_law_is_found_and_predicts(tmp_path: Path) -> None:
    experiment = plan(tmp_path, reading=Reading(predict=(3.3, 2.0)))
    pretend_all(experiment, noise=0.03)
    measured = read_runs(experiment, Reading())
    assert measured.law is not None
    law = measured.law.fit.law
    assert law.b == pytest.approx(KNOWN.b, rel=0.1) and law.predict(3.4) == pytest.approx(KNOWN.predict(3.4), rel=0.1)
    assert KNOWN.b in measured.law.b_interval() and KNOWN.predict(3.4) in measured.law.predict_interval(3.4)
    with drawn() as figures:
        results = experiment.results()
    contours, minima = figures
    # both panels' kinds of marks are explained below them, and losses rise from left to right
    assert len(contours.legends[0].get_texts()) == 4
    assert "ours, 95 % limits" in legend_of(minima.axes[0])
    assert [finding.agrees for finding in results.findings] == [True, True, True]
    rows = {row[0]: row for row in results.tables[-1].rows}
    assert float(rows["3.3"][1].replace(",", "")) == pytest.approx(law.predict(3.3), rel=0.01)
    assert rows["3.3"][3] == f"{PUBLISHED.predict(3.3):,.0f}"
    assert (rows["3.3"][4], rows["2"][4]) == ("", "extrapolated")
    assert all((tmp_path / "out" / file).stat().st_size > 10_000 for file in (CONTOURS, LAW))


def test_other_questions_are_the_same_experiment(tmp_path: Path) -> None:
    one = plan(tmp_path)
    other = plan(tmp_path, reading=Reading(losses=(3.5, 3.2), predict=(3.0,)))
    assert one.settings == other.settings
    assert [cell.fingerprint for cell in one.cells] == [cell.fingerprint for cell in other.cells]
    pretend_all(one)
    losses = {each.loss for each in read_runs(other, Reading(losses=(3.5, 3.2))).contours}
    assert losses == {3.5, 3.2}


def test_a_law_upside_down_disagrees(tmp_path: Path, undrawn: None) -> None:
    experiment = plan(tmp_path)
    pretend_all(experiment, lambda cell: BatchSizeLaw(30.0, -2.5), 0.003)
    assert [finding.agrees for finding in experiment.results().findings] == [False, True, False]


def test_a_batch_that_follows_the_size_is_no_law_of_the_loss(tmp_path: Path, undrawn: None) -> None:
    experiment = plan(tmp_path)
    pretend_all(experiment, lambda cell: BatchSizeLaw(2.0e6 * 3.0 ** (cell.labels["layers"] / 2 - 2), 6.24), 0.003)
    assert experiment.results().findings[1].agrees is False


def test_minima_beyond_the_grid_and_runs_that_are_missing_leave_it_open(tmp_path: Path, undrawn: None) -> None:
    experiment = plan(tmp_path)
    pretend_all(experiment, lambda cell: BatchSizeLaw(100 * KNOWN.a, KNOWN.b))
    [only] = experiment.results().findings
    assert only.agrees == "undecided" and "of the other contours" in only.ours
    (tmp_path / "empty").mkdir()
    empty = plan(tmp_path / "empty").results()
    assert [finding.agrees for finding in empty.findings] == ["undecided"] and empty.pictures == ()
    few = plan(tmp_path / "empty", BatchSettings(((32, 2),), BATCHES, (1,), 400_000, 50))
    for cell in few.cells[:3]:
        pretend(cell, {step: 5.0 - step / cell.last_step for step in (cell.last_step // 2, cell.last_step)})
    results = few.results()
    assert results.findings[0].agrees == "undecided" and "no law" in results.findings[0].ours


def test_minima_that_a_short_grid_hides_count_by_their_side(tmp_path: Path, undrawn: None) -> None:
    short = replace(SETTINGS, batches=(512, 1024, 2048, 4096))
    experiment = plan(tmp_path, short)
    pretend_all(experiment)
    grows = experiment.results().findings[0]  # at high losses the best batch is below the smallest
    assert grows.agrees is True and "lowest beyond the smallest batch" in grows.ours
    (tmp_path / "odd").mkdir()
    odd = plan(tmp_path / "odd", short)
    # one size whose best batch is beyond the largest at every loss, high ones too
    pretend_all(odd, lambda cell: BatchSizeLaw(40 * KNOWN.a, KNOWN.b) if cell.labels["layers"] == 6 else KNOWN)
    assert odd.results().findings[0].agrees == "undecided"
