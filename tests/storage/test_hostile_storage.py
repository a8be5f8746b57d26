"""Manifests, tables of fragments and pickles with any damage: each is read, or refused with one line."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.manifest import MANIFEST, read_manifest, write_manifest
from minicpm_megatron.storage.pickle_as_data import read_pickle_as_data
from minicpm_megatron.storage.safetensors_file import write_safetensors
from minicpm_megatron.storage.sharded import CheckpointReader, write_single
from tests.hostile import EDITS, EXAMPLES, Changed, Edit, check_line, damaged
from tests.storage.layouts import state

ENTRY = {
    "key": "k",
    "kind": "param",
    "name": "w",
    "shape": [4, 3],
    "dim": 0,
    "ranges": [[0, 4]],
    "start": 0,
    "numel": 12,
}
SIZES = st.sampled_from([-1, 0, 1, 3, 4, 12, 2**31, 2**63, 10**30, 1.5])
VALUES = SIZES | st.none() | st.text(max_size=3) | st.lists(SIZES | st.lists(SIZES, max_size=3), max_size=3)
PICKLED = {"a": [1, -(2**40), 0.5, b"x", (None, True)], "t": torch.Size([2, 3]), 3: {1, 2}}


@EXAMPLES
@given(changes=st.dictionaries(st.sampled_from([*ENTRY, "other"]), VALUES, min_size=1, max_size=3), twice=st.booleans())
def test_any_value_in_a_table_of_fragments(changes: dict[str, Any], twice: bool, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoint"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    table = json.dumps([ENTRY | changes] + [ENTRY] * twice)
    record = write_safetensors(folder / "a.safetensors", [("k", torch.arange(12.0))], {"fragments": table})
    write_manifest(folder, [record], state=state(1), facts={})
    try:
        reader = CheckpointReader(folder)
        for name in reader.names():
            # whatever is read is what was written, in the shape that the table says
            assert torch.equal(reader.read(name).reshape(-1), torch.arange(12.0))
    except UserError as error:
        check_line(error, folder)


@EXAMPLES
@given(edit=EDITS)
def test_any_damage_of_a_manifest(edit: Edit, tmp_path: Path) -> None:
    folder = tmp_path / "sound"
    if not folder.exists():
        write_single(folder, [("w", torch.ones(2, 3))], {"num_layers": 1}, {"step": 3, "tokens": 0})
    before = read_manifest(folder)
    with Changed(folder / MANIFEST) as path:
        path.write_bytes(damaged(path.read_bytes(), edit))
        try:
            assert read_manifest(folder) == before
        except UserError as error:
            check_line(error, path)


@pytest.mark.parametrize("protocol", [2, 4])
def test_any_damage_of_a_pickle(protocol: int) -> None:
    content = pickle.dumps(PICKLED, protocol=protocol)

    @EXAMPLES
    @given(edit=EDITS | st.tuples(st.integers(0, len(content)), st.sampled_from([b"R", b"b", b"0", b"."]), st.just(0)))
    def check(edit: Edit) -> None:
        try:
            read_pickle_as_data(damaged(content, edit), lambda name: name == "torch.Size", where="file")
        except UserError as error:
            check_line(error, Path("file"))

    check()


@EXAMPLES
@given(content=st.binary(max_size=80))
def test_any_bytes_as_a_pickle(content: bytes) -> None:
    try:
        read_pickle_as_data(content, lambda name: True, where="file")
    except UserError as error:
        check_line(error, Path("file"))
