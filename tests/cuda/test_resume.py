"""Runs on one GPU that are killed and go on, equal in every bit, with `training.deterministic`."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = [pytest.mark.gpu_only, pytest.mark.timeout(900)]  # each case starts a process and a context of its own

COMBINATIONS = [(0, "fp32"), (1, "bf16"), (3, "bf16")]
SAVED, KILLED = 10, 13
Jobs = tuple[Path, dict[str, list[Outcome]]]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> Jobs:
    """Undisturbed, killed after step 13, and gone on."""
    folder = tmp_path_factory.mktemp("resume")
    # of 256 tokens, so that attention's backward adds up the parts of several blocks
    recipe = nano.write_recipe(folder, data={"sequence_length": 256}, training={"deterministic": True})
    cases = {}
    for stage, precision in COMBINATIONS:
        key, overrides = f"{stage}-{precision}", [f"training.precision={precision}", f"deepspeed.zero_stage={stage}"]
        cases[f"whole {key}"] = nano.case(recipe, f"whole-{key}", *overrides, ranks=1)
        cases[f"killed {key}"] = nano.case(recipe, f"cut-{key}", *overrides, ranks=1, kill_at=KILLED, kill_rank=0)
        cases[f"resumed {key}"] = nano.case(recipe, f"cut-{key}", *overrides, ranks=1)
    outcomes = run_forked("tests.training.nano:train", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


@pytest.mark.parametrize(("stage", "precision"), COMBINATIONS)
def test_a_killed_run_goes_on_bit_for_bit(stage: int, precision: str, jobs: Jobs) -> None:
    runs, outcomes = jobs
    key = f"{stage}-{precision}"
    nano.check(outcomes[f"whole {key}"])
    assert [rank.status for rank in outcomes[f"killed {key}"]] == [-signal.SIGKILL], outcomes[f"killed {key}"][0].log
    nano.check(outcomes[f"resumed {key}"])
    assert f"at step {SAVED}" in outcomes[f"resumed {key}"][0].log
    whole, cut = runs / f"whole-{key}", runs / f"cut-{key}"
    for step in (SAVED, nano.STEPS):
        first, second = (run / "checkpoints" / f"step-{step}" for run in (whole, cut))
        assert nano.tensors(first) == nano.tensors(second) and nano.state(first) == nano.state(second)
    assert nano.losses(whole) == nano.losses(cut)
    curve = [record[2] for record in nano.losses(cut)[: nano.STEPS]]
    assert curve[-1] < curve[0] - 0.3, "it learns: bits that are equal because nothing moved would prove nothing"
