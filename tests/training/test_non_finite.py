"""A loss or gradient that is not finite stops the run before the update, at every stage, and shows what it was."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm_megatron.storage.sharded import CheckpointReader
from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

AT = 3  # steps done when the poison comes
KINDS = {"loss": ("loss", "nan"), "gradient": ("gradient norm", "inf")}
COMBINATIONS = [
    (stage, precision, poison)
    for stage in range(4)
    for precision, poison in (("fp32", "loss"), ("fp32", "gradient"), ("bf16", "gradient"))
]
# gradients that DeepSpeed moves to the host are watched by other code of its own
COMBINATIONS += [(f"{stage}-offload", precision, "gradient") for stage in (1, 2, 3) for precision in ("fp32", "bf16")]


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("non-finite")
    recipe = nano.write_recipe(folder, checkpoint={"interval": AT}, evaluation={"interval": None})
    cases = {}
    for stage, precision, poison in COMBINATIONS:
        overrides = [
            f"deepspeed.zero_stage={str(stage)[0]}",
            f"deepspeed.offload_optimizer={'cpu' if 'offload' in str(stage) else 'none'}",
            f"training.precision={precision}",
            f"training.stop_after={AT + 1}",
        ]
        bad = {"poison": poison, "poison_at": AT, "poison_rank": int(str(stage)[0]) % 2}
        cases[f"{stage}-{precision}-{poison}"] = nano.case(recipe, f"{stage}-{precision}-{poison}", *overrides, **bad)
    begun = str(folder / "runs" / f"{stage}-{precision}-{poison}" / "checkpoints" / f"step-{AT}")
    cases["again"] = nano.case(recipe, "again", *overrides, begin_with=begun, **bad)
    cases["mended"] = nano.case(recipe, "again", *overrides)
    outcomes = run_forked("tests.training.nano:train", list(cases.values()))
    return folder / "runs", dict(zip(cases, outcomes, strict=True))


@pytest.mark.parametrize(("stage", "precision", "poison"), COMBINATIONS)
def test_the_run_stops_with_the_weights_before_the_update(
    stage: int | str, precision: str, poison: str, jobs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    runs, outcomes = jobs
    name = f"{stage}-{precision}-{poison}"
    nano.check(outcomes[name], 1, 1)
    what, value = KINDS[poison]
    line = f"stopped: the {what} of step {AT + 1} is"
    assert sum(line in rank.log for rank in outcomes[name]) == 1 and "Traceback" not in outcomes[name][0].log
    bad, good = runs / name / "checkpoints" / f"step-{AT}", runs / name / "before"
    event = nano.state(bad)["fault"]
    assert (event["what"], event["step"], event["samples"]) == (what, AT + 1, [8 * AT, 8 * AT + 8])
    assert event["value"] in (value, "nan"), "an infinite gradient may become nan in the norm"
    assert nano.state(good)["fault"] is None
    mine, theirs = CheckpointReader(bad), CheckpointReader(good)
    for tensor in theirs.names():
        for kind in ("param", "exp_avg", "exp_avg_sq"):
            assert mine.read(tensor, kind).equal(theirs.read(tensor, kind)), (tensor, kind)
    assert nano.tensors(bad) == nano.tensors(good)
    assert [record[0] for record in nano.losses(runs / name)] == list(range(1, AT + 1))


def test_started_again_it_is_met_again_and_mended_it_goes_on(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    runs, outcomes = jobs
    stage, precision, poison = COMBINATIONS[-1]
    nano.check(outcomes["again"], 1, 1)
    assert f"at step {AT}" in outcomes["again"][0].log
    said = [
        [line.split("; ")[0] for line in outcomes[name][0].log.splitlines() if line.startswith("stopped:")]
        for name in (f"{stage}-{precision}-{poison}", "again")
    ]
    assert (
        said[0] == said[1] == [f"stopped: the gradient norm of step {AT + 1} is inf (samples {8 * AT} to {8 * AT + 7})"]
    )
    nano.check(outcomes["mended"])
    assert nano.state(runs / "again" / "checkpoints" / f"step-{AT + 1}")["fault"] is None
