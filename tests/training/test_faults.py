"""Steps whose numbers are wrong: skipped or undone as the recipe says, the same for runs that are killed meanwhile."""

from __future__ import annotations

import math
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minicpm_megatron.recipe import FaultsRecipe
from minicpm_megatron.training.faults import GRADIENT_NORM, LOSS, FaultPolicy, SpikeDetector
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.training.stepping import Stepper
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

BATCH = 8
SPIKE = 100.0
# step -> what is wrong with it: one fault of each kind that a step can have
SKIPPED = {3: "nan loss", 6: "infinite gradient", 13: "loss spike", 16: "gradient spike"}
KILLED = 15  # a step after the first spike and before the second, which a resumed run judges
FAULTY, CHECKPOINT, PASSED = 13, 10, 2  # the step that is undone, where it goes back to, batches passed over after it
LAYOUTS = {
    "first": ["deepspeed.zero_stage=1"],
    "third": ["deepspeed.zero_stage=3", "training.precision=bf16"],
    "pipeline": ["parallel.pipeline_model_parallel_size=2"],
}


class Scaled(torch.autograd.Function):
    """A loss of the same value with another gradient."""

    @staticmethod
    def forward(context: Any, value: torch.Tensor, factor: float) -> torch.Tensor:
        context.factor = factor
        return value.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> Any:
        return gradient * context.factor, None


def _disturb(losses: torch.Tensor, how: str) -> torch.Tensor:
    """What a broken sample, or broken hardware, makes of the losses of a micro-batch."""
    if how == "nan loss":
        return losses * math.nan
    if how == "loss spike":
        return losses * SPIKE
    return Scaled.apply(losses, math.inf if how == "infinite gradient" else SPIKE)


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """`nano.train` with faults on rank 1, or without a step, or with its data shifted.

    Args:
        case: "broken": first sample of a batch -> what is wrong with it; "broken_step": number of a step that is
            always; "left_out": numbers of the steps that do not happen; "shift": samples that every position is
            moved by; "kill_after_rollback": the step not survived once the run has gone back.
    """
    broken = case.get("broken", {})
    now: dict[str, Any] = {"first": None, "step": None}

    def before_step(stepper: Stepper) -> bool:
        run = stepper.run
        now["step"] = run.step + 1
        if run.faults.offset and run.step == case.get("kill_after_rollback") and rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return run.step + 1 in case.get("left_out", ())

    def on_read(first: int) -> None:
        now["first"] = first

    def fault() -> str | None:
        return broken.get(str(now["first"])) or ("nan loss" if now["step"] == case.get("broken_step") else None)

    def disturbed(losses: torch.Tensor) -> torch.Tensor:
        how = fault()
        return losses if how is None or rank == 0 else _disturb(losses, how)

    return nano.train(rank, case, before_step=before_step, on_losses=disturbed, on_read=on_read)


def _position(step: int) -> str:
    return str((step - 1) * BATCH)


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("faults")
    recipe = nano.write_recipe(folder, faults={"spike_window": 8, "rollback_skip": PASSED})
    skip = ["faults.non_finite=skip", "faults.spike=skip", "checkpoint.interval=7"]
    back = ["faults.non_finite=rollback", "faults.spike=rollback"]
    broken = {_position(step): how for step, how in SKIPPED.items()}
    cases: dict[str, dict[str, Any]] = {
        "skipped": nano.case(recipe, "skipped", *skip, broken=broken),
        "skipped, killed": nano.case(recipe, "killed", *skip, broken=broken, kill_at=KILLED),
        "skipped, resumed": nano.case(recipe, "killed", *skip, broken=broken),
        "left out": nano.case(recipe, "left-out", "checkpoint.interval=7", left_out=list(SKIPPED)),
    }
    for name, layout in LAYOUTS.items():
        spike = {"broken": {_position(FAULTY): "infinite gradient" if name == "third" else "loss spike"}}
        begun = str(folder / "runs" / f"{name}-begun" / "checkpoints" / f"step-{CHECKPOINT}")
        cases |= {
            f"{name}, begun": nano.case(recipe, f"{name}-begun", *layout, f"training.stop_after={CHECKPOINT}"),
            f"{name}, rolled back": nano.case(recipe, f"{name}-back", *layout, *back, **spike),
            f"{name}, shifted": nano.case(
                recipe, f"{name}-shifted", *layout, begin_with=begun, shift=BATCH * (FAULTY - CHECKPOINT + PASSED)
            ),
        }
    # the fault is not met again: the hardware was to blame, and what was decided must outlive the process
    cases["rolled back, killed"] = nano.case(recipe, "back", *LAYOUTS["first"], *back, **spike, kill_after_rollback=12)
    cases["rolled back, killed"]["broken"] = {_position(FAULTY): "loss spike"}
    cases["rolled back, resumed"] = nano.case(recipe, "back", *LAYOUTS["first"], *back)
    cases |= {
        "many skips": nano.case(
            recipe, "many", *skip, broken={_position(step): "nan loss" for step in (2, 4, 5, 6, 7)}
        ),
        "no checkpoint": nano.case(recipe, "none", *back, broken={_position(4): "nan loss"}),
        "many rollbacks": nano.case(recipe, "always", *back, "faults.max_consecutive=2", broken_step=FAULTY),
        "one more rollback": nano.case(recipe, "always", *back, "faults.max_consecutive=2", broken_step=FAULTY),
    }
    short, at_four = "training.stop_after=6", {_position(4): "nan loss"}
    cases |= {
        "stopped at once": nano.case(recipe, "start", short, broken={"0": "nan loss"}),
        "back to the start": nano.case(recipe, "start", short, *back, "faults.rollback_skip=0", broken=at_four),
        "from later data": nano.case(recipe, "later", short, shift=4 * BATCH),
    }
    outcomes = run_forked("tests.training.test_faults:worker", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


def _train(run: Path) -> list[dict[str, Any]]:
    return read_metrics(run / METRICS)


def _checkpoint(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step}"


def _stopped(outcome: list[Outcome]) -> str:
    nano.check(outcome, 1, 1)
    lines = [line for line in outcome[0].log.splitlines() if line.startswith("stopped: ")]
    assert len(lines) == 1 and "Traceback" not in outcome[0].log, outcome[0].log
    return lines[0]


def test_skipped_steps_consume_their_batch_and_change_nothing(jobs: Any) -> None:
    runs, outcomes = jobs
    nano.check(outcomes["skipped"])
    nano.check(outcomes["left out"])
    run, reference = runs / "skipped", runs / "left-out"
    assert [line["step"] for line in _train(run)] == list(range(1, nano.STEPS + 1))
    assert {line["step"] for line in _train(run) if line.get("skipped")} == set(SKIPPED)
    # every number of every other step is that of a run in which the skipped ones never happened
    skipped = {line["step"]: line for line in _train(run) if line.get("skipped")}
    kept = [record for record in nano.losses(run) if record[0] not in skipped or isinstance(record[1], str)]
    assert kept == nano.losses(reference) and len(kept) == nano.STEPS - len(SKIPPED) + 4
    for step in (7, 14, nano.STEPS):
        assert nano.tensors(_checkpoint(run, step)) == nano.tensors(_checkpoint(reference, step))
        lost = sum(number <= step for number in SKIPPED)
        assert nano.state(_checkpoint(run, step))["updates"] == step - lost


def test_a_skipped_step_says_why(jobs: Any) -> None:
    runs, outcomes = jobs
    causes = {line["step"]: line["cause"] for line in _train(runs / "skipped") if line.get("skipped")}
    assert causes[3] == "the loss of step 3 is nan (samples 16 to 23)"
    assert causes[6].startswith("the gradient norm of step 6 is ") and causes[6].endswith(" (samples 40 to 47)")
    assert causes[13].startswith("the loss of step 13 is ") and "standard deviations above" in causes[13]
    assert causes[16].startswith("the gradient norm of step 16 is ") and "standard deviations above" in causes[16]
    log = outcomes["skipped"][0].log
    assert all(log.count(f"skipped: {cause}\n") == 1 for cause in causes.values())


def test_a_run_killed_after_a_skip_goes_on_bit_for_bit(jobs: Any) -> None:
    runs, outcomes = jobs
    assert -signal.SIGKILL in [rank.status for rank in outcomes["skipped, killed"]]
    nano.check(outcomes["skipped, resumed"])
    assert "at step 14" in outcomes["skipped, resumed"][0].log
    first, second = runs / "skipped", runs / "killed"
    assert nano.losses(first) == nano.losses(second)
    assert [line.get("cause") for line in _train(first)] == [line.get("cause") for line in _train(second)]
    first, second = _checkpoint(first, nano.STEPS), _checkpoint(second, nano.STEPS)
    assert nano.tensors(first) == nano.tensors(second) and nano.state(first) == nano.state(second)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rollback_goes_on_from_the_checkpoint_with_later_data(name: str, jobs: Any) -> None:
    runs, outcomes = jobs
    for part in ("begun", "rolled back", "shifted"):
        nano.check(outcomes[f"{name}, {part}"])
    run, reference = runs / f"{name}-back", runs / f"{name}-shifted"
    assert [line["step"] for line in _train(run)] == list(range(1, nano.STEPS + 1)), "the steps undone are not told"
    after = [record for record in nano.losses(run) if record[0] > CHECKPOINT]
    assert after == nano.losses(reference) and len(after) == nano.STEPS - CHECKPOINT + 2
    first, second = _checkpoint(run, nano.STEPS), _checkpoint(reference, nano.STEPS)
    assert nano.tensors(first) == nano.tensors(second)
    end = BATCH * (FAULTY + PASSED)
    faults = nano.state(first)["faults"]
    assert faults["passed_over"] == [[BATCH * CHECKPOINT, end]] and faults["offset"] == end - BATCH * CHECKPOINT
    (event,) = read_metrics(run / METRICS, "event")
    assert event["step"] == CHECKPOINT and event["event"] in outcomes[f"{name}, rolled back"][0].log
    assert event["event"].startswith(f"rolled back to step {CHECKPOINT}: the ")
    assert event["event"].endswith(f"; passing over samples {BATCH * CHECKPOINT} to {end - 1}")


def test_a_run_killed_after_a_rollback_goes_on_bit_for_bit(jobs: Any) -> None:
    runs, outcomes = jobs
    assert -signal.SIGKILL in [rank.status for rank in outcomes["rolled back, killed"]]
    nano.check(outcomes["rolled back, resumed"])
    assert f"at step {CHECKPOINT}" in outcomes["rolled back, resumed"][0].log
    first, second = runs / "first-back", runs / "back"
    assert nano.losses(first) == nano.losses(second)
    assert read_metrics(first / METRICS, "event") == read_metrics(second / METRICS, "event")
    first, second = _checkpoint(first, nano.STEPS), _checkpoint(second, nano.STEPS)
    assert nano.tensors(first) == nano.tensors(second) and nano.state(first) == nano.state(second)


def test_too_many_faults_end_the_run(jobs: Any) -> None:
    runs, outcomes = jobs
    assert _stopped(outcomes["many skips"]) == (
        "stopped: the loss of step 7 is nan (samples 48 to 55); 3 steps before it were skipped "
        f"(faults.max_consecutive); the state before it is saved in {_checkpoint(runs / 'many', 6)}"
    )
    checkpoint = _checkpoint(runs / "always", CHECKPOINT)
    ending = f"2 rollbacks to {checkpoint} have not helped (faults.max_consecutive)"
    for name, batches in (("many rollbacks", 2), ("one more rollback", 2)):
        line = _stopped(outcomes[name])
        first = BATCH * (FAULTY - 1) + batches * BATCH * (FAULTY - CHECKPOINT + PASSED)
        said = f"the loss of step {FAULTY} is nan (samples {first} to {first + BATCH - 1})"
        assert line == f"stopped: {said}; {ending}", "also when it is started again"
    assert len(read_metrics(runs / "always" / METRICS, "event")) == 2


def test_a_rollback_to_the_start_forgets_all_updates(jobs: Any) -> None:
    runs, outcomes = jobs
    assert _stopped(outcomes["stopped at once"]).endswith(f"is saved in {_checkpoint(runs / 'start', 0)}")
    nano.check(outcomes["back to the start"])
    nano.check(outcomes["from later data"])
    assert nano.losses(runs / "start") == nano.losses(runs / "later")
    first, second = _checkpoint(runs / "start", 6), _checkpoint(runs / "later", 6)
    assert nano.tensors(first) == nano.tensors(second)


def test_without_a_checkpoint_there_is_no_rollback(jobs: Any) -> None:
    runs, outcomes = jobs
    assert _stopped(outcomes["no checkpoint"]) == (
        "stopped: the loss of step 4 is nan (samples 24 to 31); there is no checkpoint to go back to"
    )
    assert not list((runs / "none" / "checkpoints").glob("step-*"))


def test_a_spike_is_measured_in_deviations_of_the_window() -> None:
    chance, window = np.random.default_rng(0), 32
    numbers = chance.normal(3.0, 0.2, (2, 200))
    detector = SpikeDetector(window)
    for step, (loss, norm) in enumerate(numbers.T):
        for what, value, series in ((LOSS, loss, numbers[0]), (GRADIENT_NORM, norm, numbers[1])):
            past = series[max(0, step - window) : step]
            found = detector.sigmas(what, value)
            if step < window // 2:
                assert found == -math.inf
            else:
                assert found == pytest.approx((value - past.mean()) / past.std(ddof=1), rel=1e-9)
                assert abs(found) < 6, "noise is no spike"
                assert detector.sigmas(what, past.mean() + 6.5 * past.std(ddof=1)) > 6
        detector.add(loss, norm)


def test_equal_numbers_have_no_deviation() -> None:
    detector = SpikeDetector(4)
    for _ in range(4):
        detector.add(2.0, 1.0)
    assert [detector.sigmas(LOSS, value) for value in (2.0, 2.5, 1.5)] == [0.0, math.inf, -math.inf]


def test_a_policy_goes_on_from_its_state() -> None:
    recipe = FaultsRecipe(spike="skip", non_finite="rollback", spike_window=4, max_consecutive=1)
    policy = FaultPolicy(recipe)
    for loss in (3.0, 3.1, 2.9):
        assert policy.judge(LOSS, loss) is None
        policy.applied(loss, 1.0)
    assert policy.skip() and not FaultPolicy(recipe).judge(LOSS, 9.0)
    assert policy.roll_back(10, planned=80, end=120)
    again = FaultPolicy(recipe)
    again.load(policy.state())
    assert again.state() == policy.state() and again.offset == 40
    spike, infinite = again.judge(LOSS, 9.0), again.judge(GRADIENT_NORM, math.inf)
    assert spike is not None and again.answer(spike) == "skip"
    assert infinite is not None and again.answer(infinite) == "rollback"
    assert not again.skip(), "the second in a row"
    assert not again.roll_back(10, planned=80, end=160) and again.passed_over == [[80, 120], [120, 160]]
    assert again.roll_back(20, planned=160, end=240), "another checkpoint"
