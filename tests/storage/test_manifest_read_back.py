"""A manifest finds every byte that changed, and none that did not."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.storage import manifest
from minicpm_megatron.storage.manifest import MANIFEST, Unreadable, problems, read_manifest, write_manifest
from tests.storage.layouts import state, write_layout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_layout(tmp_path / "step-1", 2, 1)


def test_checksums_are_those_of_the_files(folder: Path) -> None:
    files = json.loads((folder / MANIFEST).read_text())["files"]
    assert sorted(entry["name"] for entry in files) == ["rank-00000.safetensors", "rank-00001.safetensors"]
    for entry in files:
        content = (folder / entry["name"]).read_bytes()
        assert entry["size"] == len(content) and entry["sha256"] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("position", [0, 9, -1])
def test_one_flipped_bit_anywhere(folder: Path, position: int) -> None:
    path = folder / "rank-00001.safetensors"
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)
    assert len(problems(folder)) == 1 and str(path) in problems(folder)[0]


def test_every_flipped_bit_of_the_manifest(tmp_path: Path) -> None:
    folder = tmp_path / "step-1"
    folder.mkdir()
    write_manifest(folder, [], state=state(1, rates={"hidden": 0.01}), facts={})
    sound, same = (folder / MANIFEST).read_bytes(), read_manifest(folder)
    for number in range(len(sound)):
        changed = bytearray(sound)
        changed[number] ^= 1
        (folder / MANIFEST).write_bytes(changed)
        # a space that became another character JSON ignores changes nothing that is read
        assert problems(folder) or read_manifest(folder) == same


def test_truncated_deleted_and_swapped(folder: Path) -> None:
    first, second = (folder / f"rank-0000{rank}.safetensors" for rank in (0, 1))
    spare = folder / "spare"
    os.rename(first, spare), os.rename(second, first), os.rename(spare, second)
    assert len(problems(folder)) == 2
    os.rename(first, spare), os.rename(second, first), os.rename(spare, second)
    assert problems(folder) == []
    os.truncate(second, second.stat().st_size - 1)
    assert [str(second) in line for line in problems(folder)] == [True]
    second.unlink()
    assert problems(folder) == [f"{second}: missing"]


def test_whatever_can_be_saved_can_be_loaded(tmp_path: Path) -> None:
    """Keys that are numbers sort otherwise once they are text; a path need not be UTF-8."""
    facts = {"by_rank": {2: "b", 10: "a"}, "path": os.fsdecode(b"/runs/\xff"), "name": "中文", "rate": 1e-300}
    folder = tmp_path / "step-1"
    folder.mkdir()
    write_manifest(folder, [], state=state(1, shape=(1, 2)), facts=facts)
    assert problems(folder) == []
    read = read_manifest(folder)
    assert read["by_rank"] == {"2": "b", "10": "a"} and read["path"] == facts["path"] and read["name"] == "中文"


def test_a_failing_disk_is_no_verdict(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, on_block: Callable[[], None]) -> str:
        raise OSError(5, "Input/output error", str(path))

    monkeypatch.setattr(manifest, "file_sha256", fail)
    with pytest.raises(Unreadable, match="rank-00000.safetensors: cannot be read: Input/output error"):
        problems(folder)
