"""Which checkpoint a run goes on from, and when it must not go on at all."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.checkpoint.find import newest_checkpoint, resolve_reference
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage import manifest
from tests.checkpoint.synthetic import content, names, save


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with checkpoints at 1 and 2."""
    checkpointer = Checkpointer(tmp_path / "run" / "checkpoints")
    save(checkpointer, 1)
    save(checkpointer, 2)
    return tmp_path / "run"


def _flip(folder: Path) -> None:
    path = folder / "rank-00000.safetensors"
    changed = bytearray(path.read_bytes())
    changed[-5] ^= 4
    path.write_bytes(changed)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "bit": _flip,
    "truncated": lambda folder: os.truncate(folder / "rank-00000.safetensors", 100),
    "file deleted": lambda folder: (folder / "rank-00000.safetensors").unlink(),
    "manifest deleted": lambda folder: (folder / "manifest.json").unlink(),
    "manifest cut": lambda folder: os.truncate(folder / "manifest.json", 50),
    "file of step 1": lambda folder: (folder / "rank-00000.safetensors").write_bytes(
        (folder.parent / "step-1" / "rank-00000.safetensors").read_bytes()
    ),
    "manifest of step 1": lambda folder: (folder / "manifest.json").write_bytes(
        (folder.parent / "step-1" / "manifest.json").read_bytes()
    ),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_named_and_the_policy_followed(
    run: Path, damage: Callable[[Path], object], caplog: pytest.LogCaptureFixture
) -> None:
    directory = run / "checkpoints"
    damage(directory / "step-2")
    with pytest.raises(UserError, match="newest checkpoint is damaged.*step-2.*on_corrupt=previous"):
        Checkpointer(directory, on_corrupt="stop").find_latest()
    assert names(directory) == ["latest", "step-1", "step-2.corrupt"]
    assert [r.levelno for r in caplog.records] == [logging.ERROR] and "step-2" in caplog.text
    # a scheduler that starts the job again has not allowed anything
    for _ in range(2):
        with pytest.raises(UserError, match=r"newer than step 1 is damaged: step-2\.corrupt"):
            Checkpointer(directory, on_corrupt="stop").find_latest()
    found = Checkpointer(directory, on_corrupt="previous").find_latest()
    assert found is not None and content(found) == 1
    # once the run has gone past the damage, it is history
    save(Checkpointer(directory), 3)
    found = Checkpointer(directory, on_corrupt="stop").find_latest()
    assert found is not None and content(found) == 3


def test_previous_goes_on_at_once_and_says_so(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    _flip(run / "checkpoints" / "step-2")
    found = Checkpointer(run / "checkpoints", on_corrupt="previous").find_latest()
    assert found is not None and content(found) == 1
    assert "rank-00000.safetensors" in caplog.text and caplog.records[0].levelno == logging.ERROR


def test_older_and_older_ones_are_gone_back_to(run: Path) -> None:
    directory = run / "checkpoints"
    save(Checkpointer(directory, keep_last=9), 3)
    for step in (2, 3):
        _flip(directory / f"step-{step}")
    found = Checkpointer(directory, on_corrupt="previous").find_latest()
    assert found is not None and content(found) == 1
    save(Checkpointer(directory, keep_last=9), 2)
    _flip(directory / "step-2")
    found = Checkpointer(directory, on_corrupt="previous").find_latest()
    assert found is not None and content(found) == 1
    assert names(directory) == ["latest", "step-1", "step-2.corrupt", "step-2.corrupt-2", "step-3.corrupt"]


def test_a_restored_copy_ends_the_stop(run: Path) -> None:
    directory = run / "checkpoints"
    _flip(directory / "step-2")
    with pytest.raises(UserError):
        Checkpointer(directory).find_latest()
    _flip(directory / "step-2.corrupt")
    (directory / "step-2.corrupt").rename(directory / "step-2")
    found = Checkpointer(directory).find_latest()
    assert found is not None and content(found) == 2


@pytest.mark.parametrize("policy", ["stop", "previous"])
def test_never_from_scratch_beside_damage(run: Path, policy: str) -> None:
    directory = run / "checkpoints"
    _flip(directory / "step-1")
    _flip(directory / "step-2")
    for _ in range(3):
        with pytest.raises(UserError, match="damaged"):
            Checkpointer(directory, on_corrupt=policy).find_latest()  # type: ignore[arg-type]
    if policy == "previous":
        with pytest.raises(UserError, match=r"no checkpoint is valid; damaged: step-1\.corrupt, step-2\.corrupt"):
            Checkpointer(directory, on_corrupt="previous").find_latest()


def test_a_long_verification_is_no_silence(tmp_path: Path) -> None:
    """The watchdog hears of every few megabytes: a rank of a large model reads for longer than it may be silent."""
    heard: list[Path] = []
    checkpointer = Checkpointer(tmp_path, on_progress=heard.append)
    folder = save(checkpointer, 1, rows=1 << 18)
    assert heard == [] and checkpointer.find_latest() == folder
    size = (folder / "rank-00000.safetensors").stat().st_size
    assert size > 2**23 and heard.count(folder / "rank-00000.safetensors") >= size / 2**22


def test_nothing_there_is_a_start(tmp_path: Path) -> None:
    assert Checkpointer(tmp_path / "none").find_latest() is None
    (tmp_path / "none").mkdir()
    assert Checkpointer(tmp_path / "none").find_latest() is None


def test_a_failing_disk_condemns_no_checkpoint(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sound = manifest.file_sha256

    def fail(path: Path, on_block: Callable[[], None]) -> str:
        if path.parent.name == "step-2":
            raise OSError(5, "Input/output error", str(path))
        return sound(path)

    directory = run / "checkpoints"
    monkeypatch.setattr(manifest, "file_sha256", fail)
    with pytest.raises(UserError, match="cannot be read: Input/output error"):
        Checkpointer(directory, on_corrupt="stop").find_latest()
    found = Checkpointer(directory, on_corrupt="previous").find_latest()
    assert found is not None and content(found) == 1
    assert names(directory) == ["latest", "step-1", "step-2"]


def test_damage_that_cannot_be_renamed_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(source: Path, target: Path) -> None:
        raise OSError(30, "Read-only file system", str(source))

    _flip(run / "checkpoints" / "step-2")
    monkeypatch.setattr(os, "rename", read_only)
    with pytest.raises(UserError, match="rank-00000.safetensors: the checksum is not that"):
        Checkpointer(run / "checkpoints").find_latest()


@pytest.mark.parametrize("hint", [b"", b"\x00\xff", b"../../x\n", b"step-7\n", b"step-1\n", b"/etc\n", None, "folder"])
def test_the_hint_is_not_believed(run: Path, hint: bytes | str | None) -> None:
    path = run / "checkpoints" / "latest"
    path.unlink()
    if hint == "folder":
        path.mkdir()
    elif isinstance(hint, bytes):
        path.write_bytes(hint)
    checkpointer = Checkpointer(run / "checkpoints")
    found = checkpointer.find_latest()
    assert found is not None and content(found) == 2
    assert content(save(checkpointer, 3)) == 3


def test_only_our_own_leftovers_go(run: Path) -> None:
    directory = run / "checkpoints"
    (directory / "step-3.tmp").mkdir()
    (directory / "step-3.tmp" / "rank-00000.safetensors.part").write_bytes(b"x")
    (directory / "step-0.deleting").mkdir()
    (directory / "latest.part").write_text("x")
    (directory / "step-2").rename(directory / "step-2.replaced")
    for name in ("notes.tmp", "copy.deleting", "other.replaced"):
        (directory / name).mkdir()
    (directory / "step-4.tmp").write_text("a file of somebody's")
    Checkpointer(directory).preflight(0)
    assert names(directory) == [
        "copy.deleting", "latest", "notes.tmp", "other.replaced", "step-1", "step-2", "step-4.tmp",
    ]  # fmt: skip


def test_odd_names_are_no_checkpoints(run: Path) -> None:
    for name in ("step-", "step--3", "step-03", "step-9x", "step-٩", "Step-9", "step-" + "9" * 30):
        (run / "checkpoints" / name).mkdir()
    (run / "checkpoints" / "step-7").write_text("a file")
    found = Checkpointer(run / "checkpoints").find_latest()
    assert found is not None and found.name == "step-2"


def test_a_checkpoint_that_is_asked_for_is_checked_in_full(run: Path) -> None:
    chosen = run / "checkpoints" / "step-1"
    assert Checkpointer(run / "checkpoints").open(chosen, verified=False).state.step == 1
    _flip(chosen)
    with pytest.raises(UserError, match="step-1: the checkpoint is damaged: .*rank-00000.safetensors"):
        Checkpointer(run / "checkpoints").open(chosen, verified=False)
    assert chosen.is_dir(), "another run's checkpoint is not touched"


def test_references(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for reference in ("run@1", "run@001"):
        assert resolve_reference(reference, run.parent) == run / "checkpoints" / "step-1"
    assert resolve_reference("run@latest", run.parent) == run / "checkpoints" / "step-2"
    assert resolve_reference(f"{run}@2", Path("elsewhere")) == run / "checkpoints" / "step-2"
    assert newest_checkpoint(run) == run / "checkpoints" / "step-2"
    assert newest_checkpoint(run / "checkpoints" / "step-1") == run / "checkpoints" / "step-1"
    for bad in ("", "run", "run@", "@1", "run@x", "run@-1", "run@1.5", "run@../x", "run@" + "9" * 5000):
        with pytest.raises(UserError, match="not of the form RUN@STEP"):
            resolve_reference(bad, run.parent)
    with pytest.raises(UserError, match="no run 'walk'"):
        resolve_reference("walk@1", run.parent)
    with pytest.raises(UserError, match="no checkpoint at step 7; choose one of: 1, 2"):
        resolve_reference("run@7", run.parent)
