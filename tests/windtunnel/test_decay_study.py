"""The plan of a decay study, and what it concludes from gradients and checkpoints that are known."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.checkpoint.names import step_folder
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import BatchPlan
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.storage.sharded import write_single
from minicpm_megatron.training.metrics import METRICS
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.decay_stage import findings
from minicpm_megatron.windtunnel.decay_stage.series import compare, logarithm, read_around, slope
from minicpm_megatron.windtunnel.decay_stage.study import StudySettings, plan_study
from minicpm_megatron.windtunnel.decay_stage.updates import kind_of, read_updates
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.progress import DONE
from tests.pictures import drawn, legend_of
from tests.windtunnel.pretended import base

SETTINGS = StudySettings(decay_share=0.2, shape="exponential", checkpoints=4, interval=1, seeds=(1, 2))
Numbers = Callable[[float, float], dict[str, float]]
"""(rate relative to the full one, noise) -> what a step is."""


def paper(rate: float, noise: float) -> dict[str, float]:
    """As section 4.4 has it."""
    return {
        "gradient_norm": (0.3 + 0.4 * rate) * np.exp(0.02 * noise),
        "gradient_cosine": 0.3 * (1 - rate) + 0.1 * noise,
        "first_derivative": -rate * np.exp(0.1 * noise),
        "second_derivative": 0.02 / rate**0.2 * np.exp(0.1 * noise),
        "curvature": 0.01 / rate * np.exp(0.1 * noise),
        "update_norm": rate,
        "max_gradient": 0.1,
        "loss": 3 - 0.3 * (1 - rate) + 0.01 * noise,
    }


def flat(rate: float, noise: float) -> dict[str, float]:
    """Nothing but noise."""
    return paper(1.0, 3 * noise) | {"update_norm": np.exp(0.1 * noise)}


def upside_down(rate: float, noise: float) -> dict[str, float]:
    """The opposite of section 4.4."""
    other = paper(rate, noise)
    return other | {
        "gradient_norm": 1 / other["gradient_norm"],
        "gradient_cosine": -0.1 - other["gradient_cosine"],
        "first_derivative": 1 / other["first_derivative"],
        "second_derivative": rate,
        "curvature": rate,
        "loss": 6 - other["loss"],
    }


def factor(cell: Cell, step: int) -> float:
    return build_schedule(cell.recipe.schedule).factor(BatchPlan(cell.recipe).position(step - 1))


def pretend(experiment: Experiment, numbers: Numbers, move: Callable[[float], float]) -> None:
    """Let the cells be done: a step is `numbers`, and moves an element of each matrix by `move` of the rate."""
    chance = np.random.default_rng(0)
    for cell in experiment.cells:
        lines = []
        asked = cell.recipe.logging.gradient_statistics
        for step in range(cell.first_step + 1, cell.last_step + 1):
            rate = factor(cell, step)
            told = {name: float(value) for name, value in numbers(rate, chance.standard_normal()).items()}
            loss = told.pop("loss")
            lines.append({"kind": "train", "step": step, "seconds": 0.1, "loss": loss, "lr": 0.01 * rate})
            if asked.first_step <= step < cell.last_step:
                lines.append({"kind": "gradients", "step": step, **told})
        lines.append({"kind": "evaluation", "step": cell.last_step, "set": "held-out", "loss_per_token": loss})
        cell.folder.mkdir(parents=True)
        (cell.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
        write_json(cell.folder / DONE, {"fingerprint": cell.fingerprint, "step": cell.last_step, "diverged": None})
        at = sum(move(factor(cell, step)) for step in range(1, cell.first_step + 1))
        for step in range(cell.first_step + 1, cell.last_step + 1):
            at += move(factor(cell, step))
            if step in cell.recipe.checkpoint.steps:
                save(cell, step, at)


def save(cell: Cell, step: int, at: float) -> None:
    matrices = {name: torch.zeros(3, 2, dtype=torch.float64) for name in ("decoder.layers.0.a.weight", "b.weight")}
    for number, matrix in enumerate(matrices.values(), 1):
        matrix[1, 1] = -number * at
        matrix[2, 0] = 0.5 * at
    tensors = [*matrices.items(), ("final_layernorm.weight", torch.full((3,), 100.0 * at))]
    write_single(step_folder(cell.folder / CHECKPOINTS, step), tensors, {}, {"step": step})


@pytest.fixture
def unseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pictures, which take longer than all the rest."""
    for name in ("draw_updates", "draw_gradients"):
        monkeypatch.setattr(findings, name, lambda *_: None)


def study(folder: Path, settings: StudySettings = SETTINGS) -> Experiment:
    return plan_study(base(folder), settings, folder / "out")


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_the_trunk_goes_on_beside_the_decay(tmp_path: Path, unit: str) -> None:
    scale = 1 if unit == "steps" else 128
    lengths = {key: value * scale for key, value in {"warmup": 10, "total": 400, "decay": 40}.items()}
    experiment = plan_study(base(tmp_path, schedule={"unit": unit, **lengths}), SETTINGS, tmp_path)
    assert [cell.name for cell in experiment.cells] == ["trunk-s1", "decay-s1", "trunk-s2", "decay-s2"]
    trunk, decay = experiment.cells[:2]
    assert trunk.last_step == decay.last_step == 400 and decay.first_step == 320 and decay.trunk == "trunk-s1"
    assert [factor(trunk, step) for step in (241, 320, 321, 400)] == [1] * 4
    assert factor(decay, 320) == 1 > factor(decay, 322) and factor(decay, 400) == pytest.approx(1 / 32, rel=0.1)
    # the same window before the decay as in it, and saves through both, of trunk and decay alike
    assert trunk.recipe.logging.gradient_statistics.first_step == 241
    assert decay.recipe.logging.gradient_statistics.first_step == 321
    assert trunk.recipe.checkpoint.steps == (240, 260, 280, 300, 320, 340, 360, 380, 400)
    assert decay.recipe.checkpoint.steps == (340, 360, 380, 400)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"decay_share": 0.5}, "--decay-share: 0.5 leaves no window"),
        ({"decay_share": 0.49}, "--decay-share: a decay of 196 of 400 steps and as many before it begin in the warmup"),
        ({"decay_share": 0.02}, "--interval: a decay of 8 of 400 steps has 3 measurements in its second half of 8"),
        ({"interval": 5}, "--interval: a decay of 80 of 400 steps has 7 measurements"),
        ({"interval": 0}, "--interval: 0 is no number"),
        ({"checkpoints": 81}, "--checkpoints: a decay of 80 of 400 steps has no 81 steps"),
        ({"checkpoints": 1}, "--checkpoints: 1 are too few"),
        ({"seeds": (1, 1)}, "--seeds: not a list of different"),
        ({"shape": "steep"}, "schedule.decay_shape"),
    ],
)
def test_what_cannot_be_measured_is_refused(tmp_path: Path, change: dict, said: str) -> None:
    asked = {"decay_share": 0.2, "shape": "linear", "checkpoints": 4, "interval": 1, "seeds": (1,)} | change
    with pytest.raises(UserError) as error:
        study(tmp_path, StudySettings(**asked))
    assert said in str(error.value)


def test_the_papers_numbers_agree_with_the_paper(tmp_path: Path) -> None:
    experiment = study(tmp_path)
    pretend(experiment, paper, lambda rate: rate)
    with drawn() as figures:
        results = experiment.results()
    updates, gradients = figures
    assert legend_of(updates.axes[1]) == ["without decay", "with decay"]
    assert len(gradients.legends[0].get_texts()) == 4
    assert [finding.agrees for finding in results.findings] == [True] * 8, results.findings
    for picture in results.pictures:
        assert (experiment.output / picture.file).stat().st_size > 10_000
    norm, _, first, *_ = results.findings
    # five half-lives over 80 steps; of the second half's 40 the last has no next gradient
    late = np.log([paper(2 ** -(5 * step / 80), 0)["gradient_norm"] / 0.7 for step in range(40, 79)]).mean()
    assert float(norm.ours.split("before x")[1][:4]) == pytest.approx(np.exp(late), abs=0.01)
    assert "|D1| ~ rate^1.0" in first.ours and "negative in 100% of its steps" in first.ours
    rows = {row[0]: row for row in results.tables[0].rows}
    assert float(rows["cosine above 0"][3]) > 0.9 and float(rows["gradient norm"][1]) == pytest.approx(0.7, rel=0.01)


def test_noise_alone_agrees_with_nothing_and_the_opposite_disagrees(tmp_path: Path, unseen: None) -> None:
    for name, numbers, move in (("flat", flat, 1.0), ("other", upside_down, 0.0)):
        (tmp_path / name).mkdir()
        experiment = study(tmp_path / name)
        pretend(experiment, numbers, lambda rate, move=move: rate if move == 0 else 1.0)
        found = [finding.agrees for finding in experiment.results().findings]
        if name == "flat":
            assert True not in found, found
        else:
            assert found == [False, False, False, False, False, False, True, False], found


def test_a_derivative_that_falls_less_than_the_rate_does_not_follow_it(tmp_path: Path, unseen: None) -> None:
    def numbers(rate: float, noise: float) -> dict[str, float]:
        return paper(rate, noise) | {"first_derivative": -(rate**0.2) * np.exp(0.05 * noise)}

    experiment = study(tmp_path)
    pretend(experiment, numbers, lambda rate: rate)
    found = [finding.agrees for finding in experiment.results().findings]
    assert found == [True, True, False, True, True, True, True, True], found


def test_updates_are_the_largest_of_each_matrix_wherever_the_weights_lie(tmp_path: Path, unseen: None) -> None:
    experiment = study(tmp_path, StudySettings(0.2, "linear", 4, 1, (1,)))
    pretend(experiment, paper, lambda rate: rate)
    found = read_updates(experiment)
    assert len(found) == 3 * 4 * 2 and {each.matrix for each in found} == {"decoder.layers.0.a.weight", "b.weight"}
    trunk, decay = experiment.cells
    for each in found:
        cell = decay if each.window == "decay" else trunk
        moved = sum(factor(cell, step) for step in range(each.first + 1, each.last + 1))
        assert each.largest == pytest.approx(moved * (1 if "layers" in each.matrix else 2), rel=1e-6)
        assert each.rate == pytest.approx(0.01 * moved / 20) and each.last - each.first == 20
    windows = {(each.window, each.last <= 320) for each in found}
    assert windows == {("before", True), ("control", False), ("decay", False)}
    experiment.results()
    with open(experiment.output / "updates.csv") as handle:
        assert [float(row["largest"]) for row in csv.DictReader(handle)] == [each.largest for each in found]
    assert kind_of("decoder.layers.12.mlp.linear_fc1.weight") == "decoder.layers.mlp.linear_fc1"

    file = next(step_folder(decay.folder / CHECKPOINTS, 360).glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\xff")
    with pytest.raises(UserError, match="damaged"):
        read_updates(experiment)


def test_a_seed_that_lacks_a_run_is_left_out(tmp_path: Path, unseen: None) -> None:
    experiment = study(tmp_path)
    pretend(experiment, paper, lambda rate: rate)
    (experiment.cells[3].folder / DONE).unlink()
    assert [run.seed for run in read_around(experiment)] == [1]
    assert "positive in 9" in experiment.results().findings[1].ours
    (experiment.cells[0].folder / DONE).unlink()
    assert [finding.agrees for finding in experiment.results().findings] == ["undecided"]


def test_limits_are_those_of_block_means_or_of_seeds() -> None:
    chance = np.random.default_rng(3)
    past, now, without = chance.standard_normal((3, 24))
    found = compare([(past, now, without)])
    blocks = (now - without).reshape(8, 3).mean(axis=1)
    wanted = stats.ttest_1samp(blocks, 0).confidence_interval(0.95)
    assert (found.against.low, found.against.high) == pytest.approx((wanted.low, wanted.high))
    assert found.change.estimate == pytest.approx(now.mean() - past.mean())
    seeds = [tuple(chance.standard_normal((3, 24))) for _ in range(4)]
    wanted = stats.ttest_1samp([(now - past).mean() for past, now, _ in seeds], 0).confidence_interval(0.95)
    found = compare(seeds)
    assert (found.change.low, found.change.high) == pytest.approx((wanted.low, wanted.high))


def test_one_half_of_two_comparisons_is_not_enough(tmp_path: Path, unseen: None) -> None:
    """A norm that falls with or without decay is no effect of the decay."""
    experiment = study(tmp_path, StudySettings(0.2, "linear", 2, 1, (1,)))
    pretend(experiment, flat, lambda rate: rate)
    for cell in experiment.cells:
        lines = [json.loads(line) for line in (cell.folder / METRICS).read_text().splitlines()]
        for line in lines:
            if line["kind"] == "gradients" and line["step"] > 320:
                line["gradient_norm"] /= 3
        (cell.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    finding = experiment.results().findings[0]
    assert "to before x0.3" in finding.ours and finding.agrees is not True
    runs = read_around(experiment)
    assert slope(runs, logarithm("lr"), logarithm("lr")) == pytest.approx(1)
