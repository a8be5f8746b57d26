"""Headers and manifests that somebody wrote to do harm: one clear refusal, nothing read outside the folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.manifest import MANIFEST, problems, read_manifest, write_manifest
from minicpm_megatron.storage.safetensors_file import write_safetensors
from minicpm_megatron.storage.sharded import CheckpointReader
from tests.storage.layouts import state, write_layout

ENTRY = {
    "key": "k",
    "kind": "param",
    "name": "w",
    "shape": [4, 3],
    "dim": None,
    "ranges": [],
    "start": 0,
    "numel": 12,
}


def _forge(folder: Path, table: Any) -> CheckpointReader:
    folder.mkdir()
    text = table if isinstance(table, str) else json.dumps(table)
    record = write_safetensors(folder / "a.safetensors", [("k", torch.arange(12.0))], {"fragments": text})
    write_manifest(folder, [record], state=state(1), facts={})
    return CheckpointReader(folder)


def test_the_entry_itself_is_sound(tmp_path: Path) -> None:
    assert torch.equal(_forge(tmp_path / "c", [ENTRY]).read("w"), torch.arange(12.0).view(4, 3))


@pytest.mark.parametrize(
    "change",
    [
        {"key": "absent"},
        {"shape": [10**9, 10**6]},
        {"shape": [10**9, 10**6], "numel": 10**15},
        {"shape": [10**30]},
        {"shape": [-4, -3]},
        {"shape": "ab"},
        {"shape": [4.0, 3]},
        {"shape": None},
        {"dim": 7, "ranges": [[0, 4]]},
        {"dim": -1, "ranges": [[0, 3]]},
        {"dim": "0", "ranges": [[0, 4]]},
        {"dim": 0, "ranges": [[0, -2], [-2, 6]]},
        {"dim": 0, "ranges": [[0, 10**15]], "shape": [10**15, 3]},
        {"dim": 0, "ranges": [[0]]},
        {"start": -1},
        {"start": "0"},
        {"numel": 13},
        {"name": ["w"]},
        {"kind": {}},
    ],
    ids=str,
)
def test_forged_entries_are_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        _forge(tmp_path / "c", [ENTRY | change]).read("w")


def test_memory_is_not_taken_for_a_shard_that_is_only_claimed(tmp_path: Path) -> None:
    honest = ENTRY | {"shape": [10**15, 3], "dim": 0, "ranges": [[0, 4]]}
    claimed = honest | {"ranges": [[4, 10**15 - 4]], "numel": 3 * (10**15 - 4)}
    with pytest.raises(UserError, match="overlap or leave a gap"):
        _forge(tmp_path / "c", [honest, claimed]).read("w")


@pytest.mark.parametrize("table", ["", "{}{", '{"a": 1}', "[1]", "[[]]", "[" * 100_000], ids=lambda text: text[:8])
def test_forged_tables_are_refused(tmp_path: Path, table: str) -> None:
    with pytest.raises(UserError, match="table of fragments is malformed"):
        _forge(tmp_path / "c", table)


def _rewrite(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """A manifest with another content and a checksum that fits it, as whoever forges one would write."""
    content = json.loads((folder / MANIFEST).read_text())
    del content["checksum"]
    change(content)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    (folder / MANIFEST).write_text(json.dumps(content | {"checksum": hashlib.sha256(text.encode()).hexdigest()}))


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", "sub/../x", "../../x"]
)
def test_names_outside_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = write_layout(tmp_path / "step-1", 1, 1)
    _rewrite(folder, lambda content: content["files"][0].update(name=name))
    with pytest.raises(UserError, match="not a file of this folder"):
        read_manifest(folder)
    assert problems(folder) and name in problems(folder)[0]
    with pytest.raises(UserError, match="not a file of this folder"):
        CheckpointReader(folder)


@pytest.mark.parametrize(
    "change",
    [
        lambda content: content.pop("files"),
        lambda content: content.update(files={"a": 1}),
        lambda content: content.update(files=[1]),
        lambda content: content["files"][0].update(size=float("inf")),
        lambda content: content["files"][0].pop("sha256"),
        lambda content: content.update(state=[]),
        lambda content: content["state"].pop("step"),
        lambda content: content.update(step=2),
        lambda content: content["state"].update(step=float("inf")),
        lambda content: content["state"].update(step=float("nan")),
    ],
    ids=range(10),
)
def test_malformed_manifests_are_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    folder = write_layout(tmp_path / "step-1", 1, 1)
    _rewrite(folder, change)
    with pytest.raises(UserError, match="the manifest is incomplete"):
        read_manifest(folder)
    assert len(problems(folder)) == 1


@pytest.mark.parametrize("content", [b"", b"\x00", b"[]", b"{}", b"\xff\xfe", b"[" * 100_000], ids=range(6))
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    folder = write_layout(tmp_path / "step-1", 1, 1)
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(UserError):
        read_manifest(folder)
    assert len(problems(folder)) == 1
