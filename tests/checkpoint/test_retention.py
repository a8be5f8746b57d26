"""Which checkpoints stay."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from minicpm_megatron.checkpoint import Checkpointer
from tests.checkpoint.synthetic import names, save


def _steps(directory: Path) -> list[int]:
    return sorted(int(name.removeprefix("step-")) for name in names(directory) if name != "latest")


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(1, None, [10]), (3, None, [8, 9, 10]), (2, 4, [4, 8, 9, 10]), (1, 5, [5, 10]), (99, None, list(range(1, 11)))],
)
def test_the_newest_and_every_mth(tmp_path: Path, keep_last: int, keep_every: int | None, kept: list[int]) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=keep_last, keep_every=keep_every)
    for step in range(1, 11):
        save(checkpointer, step)
    assert _steps(tmp_path) == kept


def test_named_steps_stay_for_ever(tmp_path: Path) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1, keep_steps=(3, 7, 20))
    for step in range(1, 11):
        save(checkpointer, step)
    assert _steps(tmp_path) == [3, 7, 10]


def test_what_was_just_saved_stays_below_older_steps(tmp_path: Path) -> None:
    """A run that went back to step 2 must not lose step 3 to the steps 8 and 9 of its former life."""
    for step in (2, 8, 9):
        save(Checkpointer(tmp_path, keep_last=3), step)
    save(Checkpointer(tmp_path, keep_last=2), 3)
    assert _steps(tmp_path) == [3, 8, 9]


def test_folders_without_a_manifest_take_no_place(tmp_path: Path) -> None:
    for step in (1, 2):
        save(Checkpointer(tmp_path), step)
    for step in (98, 99):
        (tmp_path / f"step-{step}").mkdir()
    save(Checkpointer(tmp_path, keep_last=2), 3)
    assert _steps(tmp_path) == [2, 3, 98, 99]


def test_a_failure_to_remove_fails_no_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    checkpointer = Checkpointer(tmp_path, keep_last=1)
    save(checkpointer, 1)

    def refuse(path: Path, **settings: object) -> None:
        if not settings:
            raise OSError(16, "Device or resource busy", str(path))

    monkeypatch.setattr(shutil, "rmtree", refuse)
    assert save(checkpointer, 2) == tmp_path / "step-2"
    assert "Device or resource busy" in caplog.text
    monkeypatch.undo()
    Checkpointer(tmp_path).preflight(0)
    assert _steps(tmp_path) == [2]
