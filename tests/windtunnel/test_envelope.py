"""The plan of continued training, and forms and trades found from losses that follow known ones."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from minicpm_megatron.methods.economics import DECAY_SHARE, trunk_tokens
from minicpm_megatron.windtunnel.branching import shared_costs
from minicpm_megatron.windtunnel.envelope import findings
from minicpm_megatron.windtunnel.envelope.findings import fit_forms, read_ends, trades
from minicpm_megatron.windtunnel.envelope.picture import PICTURE
from minicpm_megatron.windtunnel.envelope.runs import EnvelopeSettings, plan_envelope
from tests.pictures import drawn
from tests.windtunnel.pretended import base, pretend

SETTINGS = EnvelopeSettings(
    sizes=((32, 2), (64, 4)),
    points=8,
    tokens_per_parameter=(10, 1280),
    large_tokens_per_parameter=(8, 4),
    decay_share=DECAY_SHARE,
    shape="exponential",
    seeds=(1, 2, 3),
)
SMALL_SPAN = 10 * 23_712 * 6 * 23_712  # FLOPs of the small one's first end


def power(compute: float) -> float:
    return 2.5 + 1.2 * (compute / SMALL_SPAN) ** -0.3


def exponential(compute: float) -> float:
    return 2.5 + 1.2 * math.exp(-0.1 * compute / SMALL_SPAN)


def loss_of(cell, small=power, large=3.2) -> float:
    """Of the large one `large` at 4 N, a tenth less at 8 N."""
    if cell.labels["width"] == 32:
        return small(6 * cell.parameters * cell.labels["end_tokens"])
    return large - (0.1 if cell.labels["tokens_per_parameter"] == 8 else 0)


def pretend_all(experiment, noise: float = 0.001, **more) -> None:
    chance = np.random.default_rng(0)
    for cell in experiment.cells:
        seed = 0.05 * cell.labels["seed"]  # moves small and large alike
        if cell.labels["role"] == "trunk":
            steps = range(cell.last_step // 40, cell.last_step, cell.last_step // 40)
            pretend(cell, {step: 3 + 3 * math.exp(-6 * step / cell.last_step) + seed for step in steps})
        else:
            pretend(cell, loss_of(cell, **more) + seed + noise * chance.standard_normal())


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The picture takes longer than all the rest, and one test looks at it."""
    monkeypatch.setattr(findings, "draw_envelope", lambda *_: None)


def test_each_seed_has_a_trunk_a_size_and_costs_what_the_closed_form_says(tmp_path: Path) -> None:
    experiment = plan_envelope(base(tmp_path), SETTINGS, tmp_path / "out")
    assert len(experiment.cells) == 3 * (9 + 3)
    expected = 0.0
    for seed in SETTINGS.seeds:
        for width, n in ((32, 23_712), (64, 188_992)):
            own = [cell for cell in experiment.cells if cell.labels["seed"] == seed and cell.labels["width"] == width]
            assert {cell.recipe.training.seed for cell in own} == {seed} and own[0].parameters == n
            ends = [cell.labels["end_tokens"] for cell in own if cell.trunk]
            per = [10 * 2**k for k in range(8)] if width == 32 else [4, 8]
            assert ends == pytest.approx([each * n for each in per], rel=0.01)
            assert {cell.trunk for cell in own if cell.trunk} == {own[0].name}
            expected += trunk_tokens(ends, 0.1)[0]
    assert shared_costs(experiment.cells).tokens == pytest.approx(expected, rel=5e-3)


def test_a_power_law_and_the_papers_trade_are_found(tmp_path: Path) -> None:
    experiment = plan_envelope(base(tmp_path), SETTINGS, tmp_path / "out")
    pretend_all(experiment)
    small, large = read_ends(experiment)
    form = fit_forms(small)[0]
    assert (form.form, form.alpha) == ("power", pytest.approx(0.3, rel=0.05))
    at_4, at_8 = trades(small, large, form)
    for each, target in ((at_4, 3.2), (at_8, 3.1)):
        compute = SMALL_SPAN * ((target - 2.5) / 1.2) ** (-1 / 0.3)  # power, solved by hand
        assert 6 * 23_712 * each.needed == pytest.approx(compute, rel=0.05)
        assert each.ratio.estimate == pytest.approx(compute / (6 * 188_992 * each.tokens), rel=0.05)
        assert each.ratio.estimate in each.ratio and each.ratio.high < 1.2 * each.ratio.low and each.all_seeds
    with drawn() as figures:
        results = experiment.results()
    assert len(figures) == 1
    assert [finding.agrees for finding in results.findings] == [True, True, True]
    # 2 (N_l - N_s) a token pays for 6 (N_s D_s - N_l D_l); here the small one was cheaper to train, too
    assert [row[5:] for row in results.tables[2].rows] == [("0", "measured"), ("0", "measured")]
    assert "1/7.97;" in results.tables[2].title
    assert (tmp_path / "out" / PICTURE).stat().st_size > 10_000


def test_what_pays_after_how_many_tokens(tmp_path: Path, undrawn: None) -> None:
    experiment = plan_envelope(base(tmp_path), SETTINGS, tmp_path / "out")
    pretend_all(experiment, large=2.85)
    small, large = read_ends(experiment)
    row = experiment.results().tables[2].rows[0]
    n_s, n_l, d_s, d_l = 23_712, 188_992, trades(small, large, None)[0].needed, large.tokens[0]
    assert n_s * d_s > n_l * d_l
    assert float(row[5]) == pytest.approx(3 * (n_s * d_s - n_l * d_l) / (n_l - n_s), rel=0.01)


def test_an_exponential_disagrees_and_what_has_ended_to_fall_too(tmp_path: Path, undrawn: None) -> None:
    experiment = plan_envelope(base(tmp_path), SETTINGS, tmp_path / "out")
    pretend_all(experiment, small=lambda compute: exponential(compute) + 1e-4 * compute / SMALL_SPAN)
    form, falls, _ = experiment.results().findings
    assert (form.agrees, falls.agrees) == (False, False)


def test_what_lies_outside_is_extrapolated_and_says_so(tmp_path: Path, undrawn: None) -> None:
    experiment = plan_envelope(base(tmp_path), SETTINGS, tmp_path / "out")
    pretend_all(experiment, noise=1e-6, large=2.85)
    results = experiment.results()
    assert results.findings[2].agrees == "undecided" and "(extrapolated)" in results.findings[2].ours
    reached, beyond = results.tables[2].rows
    assert (reached[-1], beyond[-1]) == ("measured", "extrapolated")
    tokens = float(beyond[3].replace(",", ""))
    assert 6 * 23_712 * tokens == pytest.approx(SMALL_SPAN * ((2.75 - 2.5) / 1.2) ** (-1 / 0.3), rel=0.02)
    (tmp_path / "never").mkdir()
    never = plan_envelope(base(tmp_path / "never"), SETTINGS, tmp_path / "never" / "out")
    pretend_all(never, noise=1e-6, large=2.4)
    found = never.results()
    assert "never gets there (extrapolated)" in found.findings[2].ours and found.findings[2].agrees == "undecided"
    assert found.tables[2].rows[1][3:6] == ("-", "-", "-")


def test_noise_one_seed_and_missing_runs_leave_it_open(tmp_path: Path, undrawn: None) -> None:
    noisy = plan_envelope(base(tmp_path), SETTINGS, tmp_path / "noisy")
    pretend_all(noisy, noise=0.3)
    assert [finding.agrees for finding in noisy.results().findings[:2]] == ["undecided", "undecided"]
    one = plan_envelope(base(tmp_path), replace(SETTINGS, seeds=(1,)), tmp_path / "one")
    pretend_all(one)
    form, falls, trade = one.results().findings
    assert (form.agrees, falls.agrees, trade.agrees) == (True, "undecided", "undecided")
    assert "limits not known" in falls.ours and "limits not known" in trade.ours
    alone = plan_envelope(base(tmp_path), replace(SETTINGS, sizes=((32, 2),), seeds=(1,)), tmp_path / "alone")
    assert len(alone.results().findings) == 2
    missing = plan_envelope(base(tmp_path), SETTINGS, tmp_path / "missing").results()
    assert {finding.agrees for finding in missing.findings} == {"undecided"}
