"""The plan of a scaling law's runs, what it costs, and the law found from losses that are known."""

from __future__ import annotations

import pytest

from minicpm_megatron.methods.economics import DECAY_SHARE, trunk_tokens
from minicpm_megatron.methods.scaling_law import PUBLISHED, fit_scaling_law
from minicpm_megatron.training.metrics import METRICS
from minicpm_megatron.windtunnel.branching import shared_costs
from minicpm_megatron.windtunnel.experiment import format_plan
from minicpm_megatron.windtunnel.law.losses_csv import read_losses
from minicpm_megatron.windtunnel.law.runs import ScalingSettings, plan_scaling
from minicpm_megatron.windtunnel.law.runs_findings import LOSSES, measured_sets
from tests.windtunnel.pretended import base, pretend

SETTINGS = ScalingSettings(
    sizes=((32, 2), (64, 4), (128, 6)),
    points=6,
    tokens_per_parameter=(10, 60),
    decay_share=DECAY_SHARE,
    shape="exponential",
    method="curve_fit",
    compute=1e21,
)


def test_one_trunk_a_size_costs_what_the_closed_form_says(tmp_path) -> None:
    experiment = plan_scaling(base(tmp_path), SETTINGS, tmp_path / "out")
    assert len(experiment.cells) == 3 * 7
    costs = shared_costs(experiment.cells)
    shared = separate = flops = separate_flops = 0.0
    for width in (32, 64, 128):
        cells = [cell for cell in experiment.cells if cell.labels["width"] == width]
        decayed = [cell for cell in cells if cell.trunk is not None]
        n = cells[0].parameters
        ends = [cell.labels["end_tokens"] for cell in decayed]
        assert ends == pytest.approx([per * n for per in (10, 20, 30, 40, 50, 60)], rel=0.01)
        one = trunk_tokens(ends, decay_share=0.1)
        shared, separate = shared + one[0], separate + one[1]
        flops += sum(cell.flops() for cell in cells)
        a_token = cells[0].flops() / cells[0].tokens()
        separate_flops += a_token * sum(ends)
        steps = [cell.first_step for cell in decayed]
        assert list(cells[0].recipe.checkpoint.steps) == steps and cells[0].last_step == steps[-1]
        assert all(cell.recipe.evaluation.interval == cell.last_step for cell in cells)
    # decays are whole steps
    assert (costs.tokens, costs.separate_tokens) == (pytest.approx(shared, rel=2e-3), separate)
    assert costs.flops == flops and costs.separate_flops == pytest.approx(separate_flops)
    assert costs.tokens / costs.separate_tokens == pytest.approx(75 / 210, rel=5e-3)
    plan = format_plan(experiment)
    assert f"as separate runs: {costs.separate_tokens:,} tokens" in plan and "36% of the FLOPs" in plan


def tell(cell, losses: dict[str, float]) -> None:
    """Let a cell be done with losses per byte."""
    pretend(cell, {})
    record = '{{"kind": "evaluation", "step": {}, "set": "{}", "loss_per_token": {}, "loss_per_byte": {}}}\n'
    lines = [record.format(cell.last_step, name, 4 * loss, loss) for name, loss in losses.items()]
    (cell.folder / METRICS).write_text("".join(lines))


def test_a_known_law_is_found_per_byte(tmp_path) -> None:
    experiment = plan_scaling(base(tmp_path), SETTINGS, tmp_path / "out")
    law = PUBLISHED["code"].law
    for cell in experiment.cells:
        if cell.trunk is None:
            tell(cell, {"held-out": 9.0})
            continue
        tell(cell, {"held-out": float(law.loss(cell.parameters / 1e9, cell.labels["end_tokens"] / 1e9))})
    results = experiment.results()
    sets = read_losses(tmp_path / "out" / LOSSES)
    assert sets == measured_sets(experiment) and len(sets["held-out"]) == 18
    columns = zip(*((each.parameters / 1e9, each.tokens / 1e9, each.loss) for each in sets["held-out"]), strict=True)
    fitted = fit_scaling_law(*map(list, columns))
    assert fitted.alpha == pytest.approx(law.alpha, rel=1e-3)
    [row] = [row for row in results.tables[0].rows if row[0] == "alpha"]
    assert row[1] == f"{fitted.alpha:.4g}" and len(results.pictures) == 4
    assert results.findings[-1].agrees is True


def test_too_little_is_no_fit_and_is_said(tmp_path) -> None:
    experiment = plan_scaling(base(tmp_path), SETTINGS, tmp_path / "out")
    for cell in experiment.cells[:3]:
        tell(cell, {"held-out": 1.0})
    results = experiment.results()
    assert results.findings[0].agrees == "undecided" and "no fit: " in results.findings[0].ours
    assert results.pictures == () and len(results.tables[0].rows) == 18
