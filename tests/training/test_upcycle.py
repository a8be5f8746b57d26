"""A dense run goes on as a mixture of experts: same step, same data, same loss, under any expert parallelism."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from minicpm_megatron.convert import convert
from minicpm_megatron.derive.derived_run import DerivedRun
from minicpm_megatron.derive.upcycle import upcycle
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.upcycling import Upcycling
from minicpm_megatron.recipe import build, load_recipe
from tests.distributed.forked import Outcome, run_forked
from tests.distributed.parity import DIGITS, digits
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    if "upcycle" in case and rank == 0:
        runs = Path(case["runs"])
        dense, options = runs / "dense" / "checkpoints" / f"step-{case.get('step', 10)}", dict(case["upcycle"])
        if "published" in case:
            convert(dense, runs / case["published"], case["published"], dtype="fp32")
            dense = runs / case["published"]
        plan = Upcycling(copies=4, **options.pop("plan", {}))
        upcycle(dense, runs / case["run"], plan, **options)
    dist.barrier()
    return nano.train(rank, case)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("upcycle")
    recipe = nano.write_recipe(folder, deepspeed={"zero_stage": 1})
    runs = folder / "runs"

    def mixture(name: str, *overrides: str, **options: Any) -> dict[str, Any]:
        case = nano.case(runs / name / "recipe.yaml", name)
        return case | {"runs": str(runs), "upcycle": options | {"overrides": overrides}}

    ep2 = "parallel.expert_model_parallel_size=2"
    cases = {
        "dense": nano.case(recipe, "dense"),
        "muon": nano.case(recipe, "muon", "optimizer.name=muon", "training.stop_after=1"),
        "ep1": mixture("ep1"),
        "ep2": mixture("ep2", ep2),
        "zero2": mixture("zero2", ep2, "deepspeed.zero_stage=2"),
        "drop": mixture("drop", moments="drop"),
        "drop ep2": mixture("drop-ep2", ep2, moments="drop"),
        "fine": mixture("fine", plan={"granularity": 2}),
        "raw": mixture("raw", "model.moe_router_pre_softmax=true"),
        "granite": nano.case(recipe, "hf", "model.num_moe_experts=4", "training.stop_after=2", "evaluation.interval=2")
        | {"runs": str(runs), "upcycle": {}, "published": "granite"},
        "branch": nano.case(runs / "ep1" / "recipe.yaml", "branch", "--from", "ep1@10", "schedule.decay=4"),
        # of the end of a decay: a stage of its own, as the tool says
        "stage": nano.case(
            runs / "ended" / "recipe.yaml", "stage", "--init-from", f"{runs / 'ended'}@20", "training.stop_after=1"
        )
        | {"runs": str(runs), "run": "ended", "upcycle": {}, "step": 20},
        "longer": nano.case(runs / "ended" / "recipe.yaml", "ended", "schedule.total=40"),
        "again": nano.case(runs / "ep2" / "recipe.yaml", "ep2", "schedule.total=22", "schedule.decay=12"),
    }
    outcomes = run_forked("tests.training.test_upcycle:worker", list(cases.values()))
    return runs, dict(zip(cases, outcomes, strict=True))


def test_a_run_whose_routers_would_have_other_moments_is_refused(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["muon"])
    message = "optimizer.name: muon keeps other moments of routers than of dense MLPs; export the weights"
    for moments in ("clone", "drop"):
        with pytest.raises(UserError, match=message):
            upcycle(runs / "muon" / "checkpoints" / "step-1", runs / "sparse", Upcycling(copies=4), moments=moments)
        assert not (runs / "sparse").exists()


def test_a_decayed_run_goes_on_as_a_stage_and_in_no_other_way(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["stage"])
    assert nano.held_out(runs / "stage", 0) == pytest.approx(nano.held_out(runs / "dense", 20), rel=2e-6)
    nano.check(outcomes["longer"], 2, 2)
    assert "schedule: would have given step" in outcomes["longer"][0].log
    recipe = load_recipe(runs / "ended" / "recipe.yaml")
    done = DerivedRun(runs / "ended", 20, recipe.model, True, recipe)
    assert f"--init-from {runs / 'ended'}@20 name=NEW" in done.how_to_go_on()
    assert "go on with: " in replace(done, step=19).how_to_go_on()
    constant = build(recipe.model_dump(mode="json") | {"schedule": {"shape": "constant", "total": 20, "warmup": 4}})
    assert "go on with: examples/train.py" in (line := replace(done, recipe=constant).how_to_go_on())
    assert " schedule.total=MORE" in line


def test_a_mixture_goes_on_where_the_dense_run_stood(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["dense"])
    dense = nano.steps(runs / "dense")
    for name in ("ep1", "ep2", "drop", "fine"):
        nano.check(outcomes[name])
        assert "at step 10" in outcomes[name][0].log
        steps = nano.steps(runs / name)
        assert list(steps) == list(range(11, 21))
        # before any step of its own it is the dense model
        assert nano.held_out(runs / name, 10) == pytest.approx(nano.held_out(runs / "dense", 10), rel=2e-6)
        assert steps[11][0] == pytest.approx(dense[11][0], rel=2e-6)
        assert steps[20][0] < steps[11][0]
    # the batches are those that the dense run read in these steps
    for rank in range(2):
        assert outcomes["ep2"][rank].result["samples"] == outcomes["dense"][rank].result["samples"][10:]
    state = nano.state(runs / "ep2" / "checkpoints" / "step-20")
    assert state["updates"] == 20 and state["origin"]["step"] == 10
    assert state["origin"]["upcycling"]["copies"] == 4


@pytest.mark.parametrize(("one", "other"), [("ep1", "ep2"), ("ep1", "zero2"), ("drop", "drop-ep2")])
def test_expert_parallelism_changes_nothing(one: str, other: str, jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, _ = jobs
    first, second = nano.steps(runs / one), nano.steps(runs / other)
    assert list(first) == list(second) == list(range(11, 21))
    agreement = min(digits(a, b) for step in first for a, b in zip(first[step], second[step], strict=True))
    assert agreement > DIGITS


def test_without_renormalisation_it_is_another_model(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    """Two of four nearly equal weights sum to about a half: every MLP's output shrinks, and the loss is higher."""
    runs, outcomes = jobs
    nano.check(outcomes["raw"])
    assert nano.held_out(runs / "raw", 10) > 1.001 * nano.held_out(runs / "dense", 10)


def test_a_run_begins_with_a_published_dense_model(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    """With a recipe of one's own, at step 0 and without optimizer state."""
    runs, outcomes = jobs
    nano.check(outcomes["granite"])
    assert "at step 0" in outcomes["granite"][0].log
    # the dense model had come down to 4.9 from the 6.2 of uniform guesses
    assert nano.steps(runs / "hf")[1][0] < 5.2
    state = nano.state(runs / "hf" / "checkpoints" / "step-2")
    assert (state["updates"], state["origin"]["run"]) == (2, str(runs / "granite"))


def test_a_decay_branches_from_the_upcycled_checkpoint(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["branch"])
    branch, trunk = nano.steps(runs / "branch"), nano.steps(runs / "ep1")
    assert list(branch) == [11, 12, 13, 14] and branch[11][0] == trunk[11][0]
    assert nano.state(runs / "branch" / "checkpoints" / "step-14")["origin"] == {"run": str(runs / "ep1"), "step": 10}


def test_the_run_resumes_like_any_other(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    assert outcomes["again"][0].result["status"] == 2  # its decay has begun
    assert "schedule: would have given step 11" in outcomes["again"][0].log
    manifest = json.loads((runs / "ep1" / "checkpoints" / "step-20" / "manifest.json").read_text())
    assert manifest["recipe"]["name"] == "ep1" and manifest["model"]["num_moe_experts"] == 4
