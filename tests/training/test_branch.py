"""Decays that branch from a trunk: the trunk stays as it is, and everyone has seen the same samples."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.forked import Outcome, run_forked
from tests.training import nano

pytestmark = pytest.mark.timeout(900)  # one fixture runs every job of the file

TOKENS = 8 * 32  # a step
STEPS_TRUNK = {"schedule": {"warmup": 4, "total": 16, "decay": 4, "decay_shape": "linear"}}
TOKENS_TRUNK = {
    "schedule": {
        key: value * TOKENS if isinstance(value, int) else value for key, value in STEPS_TRUNK["schedule"].items()
    }
    | {"unit": "tokens"}
}
# the learning rate is capped at 0.005 until step 4, and has fallen to 0.0034 in step 10
POWER = ("schedule.shape=power", "schedule.options.amplitude=3.0")
WSD_S = ("schedule.shape=wsd-s", "schedule.decay=", "schedule.options.decay_share=0.25")


def _folder_hash(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        digest.update(f"{path.relative_to(folder)} {path.stat().st_mtime_ns}".encode())
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    trunk = Path(case["trunk"])
    before = _folder_hash(trunk) if trunk.exists() else None
    result = nano.train(rank, case)
    return result | {"trunk": [before, _folder_hash(trunk)]}


def _branch(recipe: Path, name: str, reference: str, *overrides: str, **extra: Any) -> dict[str, Any]:
    found = nano.case(recipe, name, *overrides, **extra)
    return found | {"arguments": [*found["arguments"], "--from", reference]}


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("branch")
    every = {"interval": 2, "keep_last": 99}
    recipe = nano.write_recipe(folder, checkpoint=every, **STEPS_TRUNK)
    (folder / "tokens").mkdir()
    in_tokens = nano.write_recipe(folder / "tokens", checkpoint=every, **TOKENS_TRUNK)
    cases = {
        "trunk": nano.case(recipe, "trunk"),
        "a": _branch(recipe, "a", "trunk@8", "schedule.decay=4"),
        "b": _branch(recipe, "b", "trunk@8", "schedule.decay=6", "schedule.decay_shape=1-sqrt"),
        "from warmup": _branch(recipe, "c", "trunk@2"),
        "from decay": _branch(recipe, "c", "trunk@14"),
        "nowhere": _branch(recipe, "c", "trunk@7"),
        "into the trunk": _branch(recipe, "trunk", "trunk@8"),
        "into another": _branch(recipe, "a", "trunk@10"),
        "another past": _branch(recipe, "c", "trunk@8", "optimizer.lr=0.004"),
        "other unit": _branch(recipe, "c", "trunk@8", "schedule.unit=tokens"),
        # a trunk that never decays, of which a killed branch goes on when the trunk is longer and has forgotten step 8
        "long": nano.case(recipe, "long", "schedule.decay=0", "training.stop_after=8"),
        "killed": _branch(recipe, "d", "long@latest", "schedule.decay=6", kill_at=11),
        "longer": nano.case(recipe, "long", "schedule.decay=0", "schedule.total=18", "checkpoint.keep_last=1"),
        "resumed": _branch(recipe, "d", "long@latest", "schedule.decay=6"),
        "undisturbed": _branch(recipe, "e", "trunk@8", "schedule.decay=6"),
        "tokens trunk": nano.case(in_tokens, "trunk"),
        "tokens branch": _branch(in_tokens, "a", "trunk@8", f"schedule.decay={4 * TOKENS}"),
        "power": nano.case(in_tokens, "power", *POWER, "training.stop_after=10"),
        "power branch": _branch(in_tokens, "p", "power@10", *POWER, f"schedule.decay={2 * TOKENS}"),
        "wsd-s": nano.case(recipe, "s", *WSD_S, "schedule.total=8"),
        "wsd-s goes on": nano.case(recipe, "s", *WSD_S, "schedule.total=12", "schedule.options.budgets=[8]"),
    }
    for name, case in cases.items():
        base = in_tokens.parent if "tokens" in name else folder
        case["trunk"] = str(base / "runs" / "trunk")
    outcomes = run_forked("tests.training.test_branch:worker", list(cases.values()))
    return folder, dict(zip(cases, outcomes, strict=True))


def _curve(run: Path) -> dict[int, tuple[Any, ...]]:
    return {record[0]: record for record in nano.losses(run) if isinstance(record[1], int)}


def _samples(outcome: list[Outcome]) -> dict[int, list[str]]:
    """First sample of a step -> hash of the tokens on every rank."""
    ranks = [rank.result["samples"] for rank in outcome]
    return {steps[0][0]: [first[2] for first in steps] for steps in zip(*ranks, strict=True)}


def test_two_decays_share_nothing_but_the_checkpoint(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    runs = folder / "runs"
    for name in ("trunk", "a", "b"):
        nano.check(outcomes[name])
    for name in ("a", "b"):
        before, after = outcomes[name][0].result["trunk"]
        assert before == after
    trunk, a, b = (_curve(runs / name) for name in ("trunk", "a", "b"))
    assert list(a) == [9, 10, 11, 12] and list(b) == [9, 10, 11, 12, 13, 14]
    # the first loss is measured before the first update: the trunk's own, to the last bit
    assert a[9][2] == b[9][2] == trunk[9][2]
    # the rates are the closed forms of the decays from step 8
    assert [a[step][3] for step in a] == pytest.approx([0.005 * (1 - 0.9 * part / 4) for part in range(1, 5)])
    assert [b[step][3] for step in b] == pytest.approx([0.005 * (1 - 0.9 * (part / 6) ** 0.5) for part in range(1, 7)])
    assert a[10][2] != b[10][2] != trunk[10][2]
    for name, last in (("a", 12), ("b", 14)):
        state = nano.state(runs / name / "checkpoints" / f"step-{last}")
        assert state["origin"] == {"run": str(runs / "trunk"), "step": 8}
        assert not (runs / name / "checkpoints" / "step-8").exists()


def test_branch_and_trunk_see_the_same_samples(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    _, outcomes = jobs
    trunk = _samples(outcomes["trunk"])
    assert list(trunk) == list(range(0, 128, 8))
    for name, steps in (("a", range(8, 12)), ("b", range(8, 14))):
        branch = _samples(outcomes[name])
        assert list(branch) == [8 * step for step in steps]
        assert all(trunk[first] == hashes for first, hashes in branch.items())
    # the horizon does not matter: the trunk that was made longer read what the short one did
    both = _samples(outcomes["long"]) | _samples(outcomes["longer"])
    assert len(both) == 18 and all(both[first] == hashes for first, hashes in trunk.items())


def test_a_killed_branch_goes_on_though_its_trunk_has_moved(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["longer"])
    assert [path.name for path in (folder / "runs" / "long" / "checkpoints").glob("step-*")] == ["step-18"]
    nano.check(outcomes["resumed"])
    assert "at step 10" in outcomes["resumed"][0].log
    nano.check(outcomes["undisturbed"])
    d, e = (folder / "runs" / name / "checkpoints" / "step-14" for name in "de")
    assert nano.tensors(d) == nano.tensors(e)
    assert _curve(folder / "runs" / "d") == _curve(folder / "runs" / "e")
    assert nano.state(d)["origin"]["step"] == 8


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("from warmup", "step 2 is not in the stable stage"),
        ("from decay", "step 14 is not in the stable stage"),
        ("nowhere", "no checkpoint at step 7; choose one of: 2, 4, 6, 8, 10, 12, 14, 16"),
        ("into the trunk", "has checkpoints already, and is a run of its own; give the new run another name"),
        ("into another", "has checkpoints already, and is from"),
        ("another past", "optimizer.lr: was 0.005 in the 8 steps already done, and is 0.004 now"),
        ("other unit", "schedule.unit: the trunk counts steps; use steps"),
    ],
)
def test_a_branch_that_cannot_be_is_refused_in_one_line(
    name: str, words: str, jobs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = jobs
    nano.check(outcomes[name], 2, 2)
    errors = [line for line in outcomes[name][0].log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in outcomes[name][0].log
    assert outcomes[name][0].result["trunk"][0] == outcomes[name][0].result["trunk"][1]
    assert not (folder / "runs" / "c").exists()


def test_a_branch_counted_in_tokens_is_the_one_counted_in_steps(
    jobs: tuple[Path, dict[str, list[Outcome]]],
) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["tokens trunk"])
    nano.check(outcomes["tokens branch"])
    for name, last in (("trunk", 16), ("a", 12)):
        steps, tokens = (base / "runs" / name for base in (folder, folder / "tokens"))
        assert _curve(steps) == _curve(tokens)
        first, second = (run / "checkpoints" / f"step-{last}" for run in (steps, tokens))
        assert nano.tensors(first) == nano.tensors(second)


def test_a_power_trunk_and_a_decay_that_leaves_it(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["power"])
    nano.check(outcomes["power branch"])
    trunk, branch = (_curve(folder / "tokens" / "runs" / name) for name in ("power", "p"))

    def rate(step: int) -> float:
        return min(0.005, TOKENS / 4096 * 3.0 * (step * TOKENS) ** -0.51)

    assert rate(4) == 0.005 > rate(10)
    expected = [rate(4) * step / 4 if step < 4 else rate(step) for step in range(1, 11)]
    assert [trunk[step][3] for step in range(1, 11)] == pytest.approx(expected, rel=1e-12)
    assert [branch[step][3] for step in branch] == pytest.approx([rate(10) * 0.55, rate(10) * 0.1], rel=1e-12)


def test_wsd_s_goes_on_from_its_decayed_checkpoint(jobs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = jobs
    nano.check(outcomes["wsd-s"])
    nano.check(outcomes["wsd-s goes on"])
    assert "at step 8" in outcomes["wsd-s goes on"][0].log
    rates = {step: record[3] / 0.005 for step, record in _curve(folder / "runs" / "s").items()}
    # decays of a quarter: steps 7 and 8, and 10 to 12; at a share r of a decay the reciprocal is 1 + 9 r
    reciprocals = [4, 2, 4 / 3, 1, 1, 1, 1 + 9 / 2, 10, 1, 1 + 9 / 3, 1 + 18 / 3, 10]
    assert [1 / rates[step] for step in range(1, 13)] == pytest.approx(reciprocals, rel=1e-9)
