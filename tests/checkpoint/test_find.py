"""Which checkpoint a run goes on from, whatever happened to the folder."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.checkpoint.find import newest_checkpoint, resolve_reference
from minicpm_megatron.errors import UserError
from tests.checkpoint.test_kill import save


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """runs/trunk/checkpoints with steps 5, 10 and 20."""
    path = tmp_path / "runs" / "trunk" / "checkpoints"
    for step in (5, 10, 20):
        save(Checkpointer(path, keep_last=3), step, seed=step, rank=0, ranks=1)
    return path


def _damaged(folder: Path, step: int) -> None:
    (folder / f"step-{step}" / "rank-00000.safetensors").write_bytes(b"x")


DAMAGE_TO_20: dict[str, Callable[[Path], object]] = {
    "a file": lambda folder: _damaged(folder, 20),
    "no manifest": lambda folder: (folder / "step-20" / "manifest.json").unlink(),
    "an empty folder": lambda folder: (shutil.rmtree(folder / "step-20"), (folder / "step-20").mkdir()),
    "another step's": lambda folder: (
        shutil.rmtree(folder / "step-20"),
        shutil.copytree(folder / "step-5", folder / "step-20"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGE_TO_20.values(), ids=DAMAGE_TO_20)
def test_a_damaged_newest_checkpoint_is_set_aside_and_named(
    damage: Callable[[Path], object], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    damage(folder)
    with pytest.raises(UserError, match=r"newest checkpoint is damaged .*kept as step-20\.corrupt"):
        Checkpointer(folder, on_corrupt="stop").find_latest()
    assert (folder / "step-20.corrupt").is_dir() and not (folder / "step-20").exists()
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "step-20" in caplog.text
    # a scheduler that starts the job again has not decided anything; the user does, by the policy
    with pytest.raises(UserError, match=r"newer than step 10 is damaged: step-20\.corrupt"):
        Checkpointer(folder, on_corrupt="stop").find_latest()
    assert Checkpointer(folder, on_corrupt="previous").find_latest() == folder / "step-10"


def test_the_policy_previous_goes_on_from_the_one_before(folder: Path) -> None:
    _damaged(folder, 20)
    _damaged(folder, 10)
    assert Checkpointer(folder, on_corrupt="previous").find_latest() == folder / "step-5"
    assert {path.name for path in folder.glob("*.corrupt")} == {"step-20.corrupt", "step-10.corrupt"}
    save(Checkpointer(folder), 10, seed=10, rank=0, ranks=1)
    _damaged(folder, 10)
    assert Checkpointer(folder, on_corrupt="previous").find_latest() == folder / "step-5"
    assert (folder / "step-10.corrupt-2").is_dir(), "what was set aside before is kept"


@pytest.mark.parametrize("policy", ["stop", "previous"])
def test_a_run_never_starts_from_scratch_beside_damaged_checkpoints(policy: str, folder: Path) -> None:
    for step in (5, 10, 20):
        _damaged(folder, step)
    for _ in range(4):
        with pytest.raises(UserError, match="damaged"):
            Checkpointer(folder, on_corrupt=policy).find_latest()
    if policy == "previous":
        with pytest.raises(UserError, match=r"no checkpoint is valid; damaged: step-10\.corrupt, step-20\.corrupt, st"):
            Checkpointer(folder, on_corrupt=policy).find_latest()


@pytest.mark.parametrize("hint", ["", "\0\xff garbage", "../../x", "/etc", "step-999", "step-5", None])
def test_the_hint_is_not_believed(hint: str | None, folder: Path) -> None:
    path = folder / "latest"
    assert path.read_text() == "step-20\n"
    path.unlink() if hint is None else path.write_text(hint)
    assert Checkpointer(folder).find_latest() == folder / "step-20"


def test_none_is_found_where_there_never_was_one(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path).find_latest() is None
    assert Checkpointer(tmp_path / "missing").find_latest() is None
    for name in ("step-x", "step-01", "step-", "other", "step--3"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-7").write_text("a file")
    assert Checkpointer(tmp_path).find_latest() is None


def test_leftovers_of_a_killed_run_are_removed_and_a_replaced_one_comes_back(folder: Path) -> None:
    for name in ("step-30.tmp", "step-3.deleting", "step-10.replaced"):
        shutil.copytree(folder / "step-5", folder / name)
    (folder / "latest.part").write_text("x")
    (folder / "step-20").rename(folder / "step-20.replaced")
    assert Checkpointer(folder).find_latest() == folder / "step-20"
    assert {path.name for path in folder.iterdir()} == {"step-5", "step-10", "step-20", "latest"}


def test_a_checkpoint_that_is_asked_for_is_checked_in_full(folder: Path) -> None:
    chosen = folder / "step-10"
    assert Checkpointer(folder).open(chosen, verified=False).state["seed"] == 10
    _damaged(folder, 10)
    with pytest.raises(UserError, match="step-10: the checkpoint is damaged: .*rank-00000.safetensors"):
        Checkpointer(folder).open(chosen, verified=False)
    assert chosen.is_dir(), "another run's checkpoint is not touched"


def test_references_name_a_run_and_a_step(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = folder.parents[1]
    monkeypatch.chdir(runs.parent)
    for reference in ("trunk@10", "runs/trunk@10", f"{runs / 'trunk'}@10", "trunk@010"):
        assert resolve_reference(reference, Path("runs")).resolve() == folder / "step-10"
    assert resolve_reference("trunk@latest", Path("runs")).name == "step-20"
    assert newest_checkpoint(runs / "trunk") == folder / "step-20"
    assert newest_checkpoint(folder / "step-5") == folder / "step-5"
    with pytest.raises(UserError, match="no checkpoint at step 7; choose one of: 5, 10, 20"):
        resolve_reference("trunk@7", Path("runs"))
    with pytest.raises(UserError, match="no run 'other' with checkpoints"):
        resolve_reference("other@7", Path("runs"))
    for wrong in ("trunk", "@5", "trunk@", "trunk@-5", "trunk@../x", "trunk@1e3", f"trunk@{'9' * 5000}", ""):
        with pytest.raises(UserError, match="RUN@STEP"):
            resolve_reference(wrong, Path("runs"))


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "left"),
    [(1, None, [100]), (2, None, [90, 100]), (3, 40, [40, 80, 90, 100]), (1, 30, [30, 60, 90, 100]), (50, 7, None)],
)
def test_the_newest_and_every_mth_are_kept(
    keep_last: int, keep_every: int | None, left: list[int] | None, tmp_path: Path
) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=keep_last, keep_every=keep_every)
    steps = range(10, 101, 10)
    for step in steps:
        save(checkpointer, step, seed=step, rank=0, ranks=1)
    found = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.glob("step-*"))
    assert found == (list(steps) if left is None else left)
    assert (tmp_path / "latest").read_text() == "step-100\n"


def test_what_was_just_saved_stays_even_below_later_steps(folder: Path) -> None:
    save(Checkpointer(folder, keep_last=1), 7, seed=7, rank=0, ranks=1)
    assert {path.name for path in folder.glob("step-*")} == {"step-7", "step-20"}
