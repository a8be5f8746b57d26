"""Every kind of damage to a checkpoint folder is found and named."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.checksum import FileRecord
from minicpm_megatron.storage.manifest import problems, read_manifest, write_manifest
from tests.storage import synthetic

FILE = "rank-00001.safetensors"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return synthetic.write(tmp_path / "step-7", synthetic.tensors(0), step=7, dp=2)


def _flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def _swap(folder: Path) -> None:
    a, b = folder / "rank-00000.safetensors", folder / FILE
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second)
    b.write_bytes(first)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a bit in the header": lambda folder: _flip(folder / FILE, 20),
    "a bit in a weight": lambda folder: _flip(folder / FILE, -1),
    "truncated": lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes()[:-1]),
    "empty": lambda folder: (folder / FILE).write_bytes(b""),
    "longer": lambda folder: (folder / FILE).write_bytes((folder / FILE).read_bytes() + b"\0"),
    "deleted": lambda folder: (folder / FILE).unlink(),
    "a folder": lambda folder: ((folder / FILE).unlink(), (folder / FILE).mkdir()),
    "swapped": _swap,
}


def test_an_undamaged_folder_has_no_problems(folder: Path) -> None:
    assert problems(folder) == []


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damage_is_named_with_its_file(damage: Callable[[Path], object], folder: Path) -> None:
    damage(folder)
    found = problems(folder)
    assert found and any(str(folder / FILE) in line for line in found)


def test_one_flipped_bit_anywhere_in_the_manifest_is_found(folder: Path) -> None:
    path = folder / "manifest.json"
    before, value = path.read_bytes(), json.loads(path.read_bytes())
    chance = random.Random(0)
    for _ in range(400):
        path.write_bytes(before)
        _flip(path, chance.randrange(len(before)), chance.randrange(8))
        try:
            same = json.loads(path.read_bytes()) == value
        except ValueError:
            same = False
        assert same or problems(folder)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/b", "..", ".", "", "sub/../../x"])
def test_a_manifest_cannot_point_out_of_its_folder(name: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    folder = tmp_path / "step-1"
    folder.mkdir()
    write_manifest(folder, [FileRecord(name, 1, "0" * 64)], state={"step": 1}, facts={})
    with pytest.raises(UserError, match="not a file of this folder"):
        read_manifest(folder)
    assert problems(folder)


@pytest.mark.parametrize("content", ["", "null", "[]", "{}", '{"format": 1}', "\0\0\0", "[" * 200_000, '{"a": NaN}'])
def test_what_is_no_manifest_is_refused_in_one_line(content: str, folder: Path) -> None:
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest.json") as caught:
        read_manifest(folder)
    assert "\n" not in str(caught.value)
