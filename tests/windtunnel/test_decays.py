"""The plan of decays and cosines, what it costs, and what it concludes from losses that are known."""

from __future__ import annotations

import numpy as np
import pytest

from minicpm_megatron.methods.economics import trunk_tokens
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.windtunnel.branching import shared_costs
from minicpm_megatron.windtunnel.decays.comparison import DecaySettings, plan_decays
from minicpm_megatron.windtunnel.decays.findings import compare
from minicpm_megatron.windtunnel.noise import noise_of
from tests.pictures import drawn, legend_of
from tests.windtunnel.pretended import base, pretend

SETTINGS = DecaySettings(
    ends=(0.5, 1.0), shares=(0.025, 0.1, 0.2), shapes=("exponential", "linear"), periods=(1.0, 1.5), seeds=(1, 2, 3)
)


def test_one_trunk_costs_what_the_closed_form_says(tmp_path) -> None:
    settings = DecaySettings(ends=(0.25, 0.5, 1), shares=(0.1,), shapes=("linear",), periods=(1,), seeds=(1,))
    costs = shared_costs(plan_decays(base(tmp_path), settings, tmp_path).cells)
    shared, separate = trunk_tokens([100, 200, 400], decay_share=0.1)
    assert (costs.tokens, costs.separate_tokens) == (round(shared) * 128, round(separate) * 128)


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_every_branch_follows_its_trunk_and_ends_together_with_the_others(tmp_path, unit) -> None:
    scale = 1 if unit == "steps" else 128
    lengths = {key: value * scale for key, value in {"warmup": 10, "total": 400, "decay": 40}.items()}
    experiment = plan_decays(base(tmp_path, schedule={"unit": unit, **lengths}), SETTINGS, tmp_path)
    by_name = {cell.name: cell for cell in experiment.cells}
    for cell in experiment.cells:
        schedule = build_schedule(cell.recipe.schedule)
        if cell.labels["role"] != "wsd":
            continue
        trunk = by_name[cell.trunk]
        full = build_schedule(trunk.recipe.schedule)
        assert cell.first_step in trunk.recipe.checkpoint.steps and cell.first_step <= trunk.last_step
        assert cell.last_step == cell.labels["end_step"] == 400 * cell.labels["end"]
        assert cell.last_step - cell.first_step == cell.labels["share"] * cell.last_step
        for step in (1, 7, cell.first_step):
            assert schedule.factor(step * scale) == full.factor(step * scale)
        assert schedule.factor((cell.first_step + 1) * scale) < 1
        wanted = 1 / 32 if cell.labels["shape"] == "exponential" else 0.1
        assert schedule.end_factor == pytest.approx(wanted)
    names = {name.removesuffix("-s1") for name in by_name if name.endswith("-s1")}
    cosines = {"cosine-T0.5", "cosine-T1", "cosine-T1.5", "cosine-loop-T0.5"}
    assert {name for name in names if name.startswith("cosine")} == cosines
    assert len(names) == 1 + 2 * 3 * 2 + 4
    assert all(200 % cell.recipe.evaluation.interval == 0 for cell in experiment.cells)


def loss_of(cell, end: float) -> float:
    """Losses as the paper has them: Cosine(T = S) 3, 10 % as good, 2.5 % and other periods worse."""
    labels = cell.labels
    if labels["role"] == "wsd":
        return {0.025: 3.1, 0.1: 2.99, 0.2: 2.989}[labels["share"]]
    return 3.0 if labels["role"] == "cosine" and labels["period"] == end else 3.05


def run(experiment, noise: float, loss=loss_of):
    chance = np.random.default_rng(0)
    for cell in experiment.cells:
        losses = {200: loss(cell, 0.5), 400: loss(cell, 1)} if cell.labels["role"] != "trunk" else {200: 3.4}
        seed = 0.2 * cell.labels["seed"]  # moves all arms alike
        pretend(cell, {step: value + seed + noise * chance.standard_normal() for step, value in losses.items()})
    return experiment.results()


def test_the_papers_losses_agree_with_the_paper(tmp_path) -> None:
    with drawn() as figures:
        results = run(plan_decays(base(tmp_path), SETTINGS, tmp_path / "out"), 0.001)
    assert [finding.agrees for finding in results.findings] == [True] * 5
    assert (tmp_path / "out" / "decays.png").exists() and (tmp_path / "out" / "cosines.png").exists()
    cosines, decays = (figure.axes[0] for figure in figures)
    # 400 steps of 128 tokens
    assert "S = 51.2 k tokens" in cosines.get_title()
    assert [name for name in legend_of(decays) if name.startswith("Cosine")] == [
        "Cosine(T = 51.2 k tokens)",
        "Cosine(T = 25.6 k tokens)",
    ]


def test_noise_leaves_it_open_and_other_losses_disagree(tmp_path) -> None:
    noisy = run(plan_decays(base(tmp_path), SETTINGS, tmp_path / "noisy"), 0.3)
    assert [finding.agrees for finding in noisy.findings] == ["undecided"] * 4 + [True]

    def upside_down(cell, end):
        return 6 - loss_of(cell, end) + (0.2 if cell.labels.get("share") == 0.1 else 0)

    other = run(plan_decays(base(tmp_path), SETTINGS, tmp_path / "other"), 0.001, upside_down)
    assert [finding.agrees for finding in other.findings] == [False] * 4 + [True]


def test_one_seed_decides_nothing(tmp_path) -> None:
    settings = DecaySettings(ends=(1,), shares=(0.025, 0.1), shapes=("linear",), periods=(0.5, 1), seeds=(1,))
    results = run(plan_decays(base(tmp_path), settings, tmp_path / "out"), 0.0)
    assert {finding.agrees for finding in results.findings[:-1]} == {"undecided"}


def test_noise_is_that_of_a_linear_model_of_arms_and_seeds() -> None:
    chance = np.random.default_rng(1)
    losses = chance.standard_normal((5, 4)) + 10 * chance.standard_normal((1, 4))
    arms, seeds = np.indices(losses.shape)
    design = np.concatenate([np.eye(5)[arms.ravel()], np.eye(4)[seeds.ravel()]], axis=1)
    fit = np.linalg.lstsq(design, losses.ravel(), rcond=None)[0]
    residual = losses.ravel() - design @ fit
    found = noise_of(np.concatenate([losses, np.full((1, 4), np.nan)]))
    assert found.deviation == pytest.approx(np.sqrt((residual**2).sum() / 12)) and found.dof == 12


def test_a_comparison_reads_each_length_where_it_is(tmp_path) -> None:
    experiment = plan_decays(base(tmp_path), SETTINGS, tmp_path / "out")
    for cell in experiment.cells:
        pretend(cell, {step: step + cell.labels["seed"] / 10 for step in (200, 400)})
    longest, half = compare(experiment)
    assert longest.losses["cosine", 0.5, ""].tolist() == [400.1, 400.2, 400.3]
    assert half.losses["cosine", 1.0, ""].tolist() == [200.1, 200.2, 200.3]
    assert ("cosine_loop", 0.5, "") in longest.losses and ("cosine_loop", 0.5, "") not in half.losses
