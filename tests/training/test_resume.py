"""20 steps = 10 + SIGKILL + 10, equal in every bit; and other layouts go on from the same checkpoint."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

COMBINATIONS = [(stage, precision) for stage in (0, 1, 2, 3, "pipeline") for precision in ("fp32", "bf16")]
OFFLOAD = ["deepspeed.offload_optimizer=cpu", "deepspeed.offload_param=cpu"]
# after 11 steps of 2 micro-batches, which DeepSpeed does not count as whole steps of 4
GROWTH = 'training.batch_growth=[{"after_tokens": 2700, "global_batch_size": 16}]'


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """Every job of this file, by name, in one go: undisturbed, killed in step 14, and gone on."""
    folder = tmp_path_factory.mktemp("resume")
    recipe = nano.write_recipe(folder)
    cases: dict[str, dict[str, Any]] = {}
    for stage, precision in COMBINATIONS:
        key, overrides = f"{stage}-{precision}", [f"training.precision={precision}"]
        overrides.append(
            "parallel.pipeline_model_parallel_size=2" if stage == "pipeline" else f"deepspeed.zero_stage={stage}"
        )
        # the second of each: saved in mid-decay, where the batch has grown, and killed on the other rank
        extra = {"kill_at": 13, "kill_rank": 1}
        if precision == "bf16":
            overrides += ["checkpoint.interval=12", GROWTH]
            extra = {"kill_at": 14, "kill_rank": 0}
        cases[f"whole {key}"] = nano.case(recipe, f"whole-{key}", *overrides)
        cases[f"killed {key}"] = nano.case(recipe, f"cut-{key}", *overrides, **extra)
        cases[f"resumed {key}"] = nano.case(recipe, f"cut-{key}", *overrides)
    plus_plus = folder / "zero-plus-plus.json"
    plus_plus.write_text('{"zero_optimization": {"zero_hpz_partition_size": 2}}')
    for name, ranks, origin, overrides in (
        ("tp2", 2, "1", ["parallel.tensor_model_parallel_size=2"]),
        ("zero3", 2, "1", ["deepspeed.zero_stage=3"]),
        ("alone", 1, "pipeline", []),
        ("pp2", 2, "3", ["parallel.pipeline_model_parallel_size=2"]),
        ("cp2", 2, "pipeline", ["parallel.context_parallel_size=2", "deepspeed.zero_stage=3"]),
        ("offload", 2, "3", ["deepspeed.offload_optimizer=cpu"]),
        ("hpz", 2, "1", ["deepspeed.zero_stage=3", *OFFLOAD, f"deepspeed.config={plus_plus}"]),
    ):
        begun = str(folder / "runs" / f"whole-{origin}-fp32" / "checkpoints" / "step-10")
        cases[name] = nano.case(recipe, name, *overrides, ranks=ranks, begin_with=begun)
    outcomes = run_forked("tests.training.nano:train", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_a_killed_run_goes_on_bit_for_bit(
    stage: int | str, precision: str, jobs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    runs, outcomes = jobs
    key = f"{stage}-{precision}"
    nano.check(outcomes[f"whole {key}"])
    killed = outcomes[f"killed {key}"]
    assert -signal.SIGKILL in [rank.status for rank in killed] and all(rank.status for rank in killed)
    nano.check(outcomes[f"resumed {key}"])
    whole, cut = runs / f"whole-{key}", runs / f"cut-{key}"
    saved = 10 if precision == "fp32" else 12
    assert f"at step {saved}" in outcomes[f"resumed {key}"][0].log
    for step in (saved, nano.STEPS):
        first, second = (run / "checkpoints" / f"step-{step}" for run in (whole, cut))
        assert len(nano.tensors(first)) == 2 and nano.tensors(first) == nano.tensors(second)
        assert nano.state(first) == nano.state(second)
    assert nano.losses(whole) == nano.losses(cut)
    assert len(nano.losses(cut)) == nano.STEPS + 4
    seen = [[batch for batch in rank.result["samples"] if batch[0] >= 0] for rank in outcomes[f"whole {key}"]]
    again = [rank.result["samples"] for rank in outcomes[f"resumed {key}"]]
    assert [rank[saved:] for rank in seen] == again
    # and the run is one that learns: bits that are equal because nothing moved would prove nothing
    curve = [record[2] for record in nano.losses(cut)[: nano.STEPS]]
    assert curve[-1] < curve[0] - 0.3


@pytest.mark.parametrize("name", ["tp2", "zero3", "alone", "pp2", "cp2", "offload", "hpz"])
def test_another_layout_goes_on_from_the_same_checkpoint(
    name: str, jobs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    runs, outcomes = jobs
    nano.check(outcomes[name])
    layout = json.loads((runs / name / "checkpoints" / "step-20" / "manifest.json").read_text())["layout"]
    sizes = ("world_size", "tensor_model_parallel_size", "pipeline_model_parallel_size", "zero_stage")
    assert [layout[size] for size in sizes] == {
        "tp2": [2, 2, 1, 1],
        "zero3": [2, 1, 1, 3],
        "alone": [1, 1, 1, 1],
        "pp2": [2, 1, 2, 1],
        "cp2": [2, 1, 1, 3],
        "offload": [2, 1, 1, 1],
        "hpz": [2, 1, 1, 3],
    }[name]
    whole = [record[2] for record in nano.losses(runs / "whole-1-fp32")[nano.HALF : nano.STEPS]]
    other = [record[2] for record in nano.losses(runs / name)[: nano.HALF]]
    assert other == pytest.approx(whole, rel=1e-5)
