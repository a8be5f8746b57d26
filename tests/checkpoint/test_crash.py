"""A process killed at every single operation on the file system that a save makes, in turn."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.storage.manifest import problems
from tests.checkpoint.synthetic import content, names, save

OPERATIONS = ("mkdir", "rename", "replace", "fsync", "unlink", "rmdir")
KEEP = {"keep_last": 2}


def _in_child(action: Callable[[], object], kill_at: int) -> int:
    """Do `action` in a child that dies before operation number `kill_at`; its wait status."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1]
    status = 1
    try:
        count = 0

        def counted(operation: Callable[..., object]) -> Callable[..., object]:
            def call(*args: object, **kwargs: object) -> object:
                nonlocal count
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                count += 1
                return operation(*args, **kwargs)

            return call

        for name in OPERATIONS:
            setattr(os, name, counted(getattr(os, name)))
        action()
        status = 0
    finally:
        sys.stdout.flush()
        os._exit(status)


def _sweep(tmp_path: Path, before: list[tuple[int, int]], new: tuple[int, int], allowed: set[tuple[int, int]]) -> None:
    """Save `before`, then (step, content) `new` with a kill at each operation; what is found must be `allowed`."""
    seen = set()
    for kill_at in range(200):
        directory = tmp_path / str(kill_at) / "checkpoints"
        for step, value in before:
            save(Checkpointer(directory, **KEEP), step, value)
        status = _in_child(lambda at=directory: save(Checkpointer(at, **KEEP), *new), kill_at)
        after = Checkpointer(directory, on_corrupt="stop", **KEEP)
        after.preflight(0)
        found = after.find_latest()
        assert (found is None) == (not before and None in [found])
        if found is not None:
            step, value = int(found.name.removeprefix("step-")), content(found)
            assert (step, value) in allowed, f"killed before operation {kill_at}"
            seen.add((step, value))
        assert not [name for name in names(directory) if not (name == "latest" or name.startswith("step-"))]
        assert not [name for name in names(directory) if "." in name]
        for folder in directory.glob("step-*"):
            assert problems(folder) == []
        # and the run goes on from there
        assert content(save(after, *new)) == new[1]
        assert content(after.find_latest() or Path()) == new[1]
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    else:
        pytest.fail("the sweep never came to an end")
    assert kill_at > 8 and seen == allowed


def test_the_first_save(tmp_path: Path) -> None:
    _sweep(tmp_path, [], (1, 1), {(1, 1)})


def test_a_save_that_retires_an_old_checkpoint(tmp_path: Path) -> None:
    _sweep(tmp_path, [(1, 1), (2, 2)], (3, 3), {(2, 2), (3, 3)})


def test_a_save_that_replaces_the_same_step(tmp_path: Path) -> None:
    _sweep(tmp_path, [(1, 1), (2, 20)], (2, 21), {(2, 20), (2, 21)})
