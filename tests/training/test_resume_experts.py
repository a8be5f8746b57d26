"""A mixture of experts under expert parallelism: killed and resumed bit for bit, and gone on with in other layouts."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from minicpm_megatron.training.expert_picture import PICTURE, finish_experts
from minicpm_megatron.training.metrics import EXPERTS, METRICS, read_metrics
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(600)  # one fixture runs every job of the file

DIVIDED = "parallel.expert_model_parallel_size=2"
COMBINATIONS = [(1, "fp32"), (1, "bf16"), (2, "fp32"), (2, "bf16")]
OTHERS: dict[str, tuple[int, list[str]]] = {
    "alone": (1, []),
    "whole experts, ZeRO 3": (2, ["deepspeed.zero_stage=3"]),
    "tensor parallel": (2, ["parallel.tensor_model_parallel_size=2", "parallel.sequence_parallel=true"]),
    "pipeline": (2, ["parallel.pipeline_model_parallel_size=2"]),
    "other experts": (4, ["parallel.expert_model_parallel_size=4", "training.micro_batch_size=1"]),
}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("experts")
    recipe = nano.write_recipe(folder, model=nano.MODEL | {"num_moe_experts": 4})
    cases = {}
    for stage, precision in COMBINATIONS:
        key, overrides = f"{stage}-{precision}", [DIVIDED, f"deepspeed.zero_stage={stage}"]
        overrides.append(f"training.precision={precision}")
        cases[f"whole {key}"] = nano.case(recipe, f"whole-{key}", *overrides)
        cases[f"killed {key}"] = nano.case(recipe, f"cut-{key}", *overrides, kill_at=13)
        cases[f"resumed {key}"] = nano.case(recipe, f"cut-{key}", *overrides)
        poisoned = nano.case(recipe, f"poisoned-{key}", *overrides, poison_at=nano.HALF, poison="gradient")
        cases[f"poisoned {key}"] = poisoned
    begun = str(folder / "runs" / "whole-1-fp32" / "checkpoints" / "step-10")
    for name, (ranks, overrides) in OTHERS.items():
        run = name.replace(" ", "-").replace(",", "")
        cases[name] = nano.case(recipe, run, *overrides, ranks=ranks, begin_with=begun)
    outcomes = run_forked("tests.training.nano:train", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_a_killed_run_goes_on_bit_for_bit(stage, precision, jobs):
    runs, outcomes = jobs
    key = f"{stage}-{precision}"
    nano.check(outcomes[f"whole {key}"])
    assert -signal.SIGKILL in [rank.status for rank in outcomes[f"killed {key}"]]
    nano.check(outcomes[f"resumed {key}"])
    whole, cut = runs / f"whole-{key}", runs / f"cut-{key}"
    for step in (10, nano.STEPS):
        first, second = (run / "checkpoints" / f"step-{step}" for run in (whole, cut))
        assert len(nano.tensors(first)) == 2 and nano.tensors(first) == nano.tensors(second)
        assert nano.state(first) == nano.state(second)
    assert nano.losses(whole) == nano.losses(cut)
    curve = [record[2] for record in nano.losses(cut)[: nano.STEPS]]
    assert curve[-1] < curve[0] - 0.3


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_a_gradient_that_is_not_finite_on_one_rank_moves_no_expert_on_any(stage, precision, jobs):
    runs, outcomes = jobs
    name = f"poisoned-{stage}-{precision}"
    nano.check(outcomes[f"poisoned {stage}-{precision}"], 1, 1)
    saved = runs / name / "checkpoints" / f"step-{nano.HALF}"
    assert nano.state(saved)["fault"]["what"] == "gradient norm"
    assert nano.tensors(saved) == nano.tensors(runs / name / "before")


@pytest.mark.parametrize("name", OTHERS)
def test_another_layout_goes_on_from_the_same_checkpoint(name, jobs):
    runs, outcomes = jobs
    nano.check(outcomes[name])
    whole = [record[2] for record in nano.losses(runs / "whole-1-fp32")[nano.HALF : nano.STEPS]]
    other = [record[2] for record in nano.losses(runs / name.replace(" ", "-").replace(",", ""))[: nano.HALF]]
    assert other == pytest.approx(whole, rel=1e-5)


def test_the_rates_of_experts_and_router_are_saved(jobs):
    runs, _ = jobs
    rates = nano.state(runs / "whole-1-fp32" / "checkpoints" / "step-10")["rates"]
    assert set(rates) == {"embedding", "hidden", "expert", "vector", "router"}
    assert rates["expert"] == rates["router"] == rates["hidden"]


def test_a_run_says_how_its_experts_were_used(jobs, capsys):
    runs, _ = jobs
    for key in ("whole-1-fp32", "pipeline", "tensor-parallel"):
        records = read_metrics(runs / key / METRICS, EXPERTS)
        assert [record["step"] for record in records][-1] == nano.STEPS
        for record in records:
            assert [layer["layer"] for layer in record["layers"]] == [1, 2]
            for layer in record["layers"]:
                assert sum(layer["share"]) == pytest.approx(1) and layer["dropped"] == 0
                assert 0 < layer["evenness"] <= 1 and layer["load_balancing_loss"] > 0.5
    finish_experts(runs / "whole-1-fp32")
    assert (runs / "whole-1-fp32" / PICTURE).stat().st_size > 10_000
    assert "(even: 25.0%)" in capsys.readouterr().out
    dense = runs / "dense"
    dense.mkdir()
    (dense / METRICS).write_text(json.dumps({"kind": "train", "step": 1, "loss": 1.0}) + "\n")
    finish_experts(dense)
    assert not (dense / PICTURE).exists()
