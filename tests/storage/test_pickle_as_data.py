"""Pickles read as data: the values that pickle itself reads, objects as descriptions, and nothing executed."""

from __future__ import annotations

import argparse
import collections
import os
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.pickle_as_data import Description, Name, read_pickle_as_data

PLAIN: list[Any] = [
    None,
    True,
    [1, -1, 255, 256, 65_536, -(2**40), 2**100, 0.1, float("inf")],
    {"a": {"b": (1, (2, 3), (4, 5, 6), (7, 8, 9, 10), ())}, 3: [], "long " * 100: "ä" * 300},
    [[number] * 3 for number in range(2000)],
]
CASES = [(value, protocol) for value in PLAIN for protocol in (2, 3, 4, 5)]
# earlier protocols call functions for these
CASES += [([b"", b"x" * 300, {1, 2, 3}, set()], protocol) for protocol in (4, 5)]


def read(content: bytes, allowed: set[str] | None = None) -> Any:
    names = allowed or set()
    return read_pickle_as_data(content, lambda name: allowed is None or name in names, where="file")


@pytest.mark.parametrize(("value", "protocol"), CASES, ids=range(len(CASES)))
def test_plain_values_are_those_of_pickle(value: Any, protocol: int) -> None:
    assert read(pickle.dumps(value, protocol=protocol)) == value


def test_what_is_there_once_stays_one_thing() -> None:
    shared: list[Any] = [1]
    first, second = read(pickle.dumps([shared, shared], protocol=4))
    assert first is second


@pytest.mark.parametrize("protocol", [2, 4])
def test_objects_are_described(protocol: int) -> None:
    value = {
        "chunk": ChunkStorageMetadata(torch.Size((0, 2)), torch.Size((3, 4))),
        "args": argparse.Namespace(layers=2, dtype=torch.bfloat16),
        "ordered": collections.OrderedDict(a=1),
        MetadataIndex("name", (1, 2)): 7,
    }
    found = read(pickle.dumps(value, protocol=protocol))
    chunk, args, ordered = found["chunk"], found["args"], found["ordered"]
    assert chunk.made_by == "torch.distributed.checkpoint.metadata.ChunkStorageMetadata"
    offsets = chunk.state["offsets"]
    assert (offsets.made_by, offsets.arguments) == ("torch.Size", ((0, 2),))
    assert (args.made_by, args.state) == ("argparse.Namespace", {"layers": 2, "dtype": Name("torch.bfloat16")})
    assert (ordered.made_by, ordered.items) == ("collections.OrderedDict", [("a", 1)])
    [index] = [key for key in found if isinstance(key, Description)]
    assert index.state["fqn"] == "name" and found[index] == 7


class Bomb:
    """Make a folder where pickle reads it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_nothing_is_executed(protocol: int, tmp_path: Path) -> None:
    bomb = pickle.dumps({"a": [Bomb(tmp_path / "made")]}, protocol=protocol)
    with pytest.raises(UserError, match="posix.mkdir|asks for"):
        read(bomb, allowed=set())
    if protocol > 1:  # even where every name is allowed
        [made] = read(bomb)["a"]
        assert (made.made_by, made.arguments) == ("posix.mkdir", (str(tmp_path / "made"),))
    assert not (tmp_path / "made").exists()
    pickle.loads(bomb)
    assert (tmp_path / "made").exists()  # it would have worked


def test_a_name_without_a_place_is_refused_by_name() -> None:
    content = pickle.dumps([torch.Size((1,)), collections.OrderedDict()], protocol=4)
    with pytest.raises(UserError, match="file: a pickle that names 'collections.OrderedDict', .* nothing was executed"):
        read(content, allowed={"torch.Size"})


def test_bytes_that_are_no_pickle() -> None:
    """Cut anywhere, and with any byte changed: a value or a UserError, never another exception, never an import."""
    value = {"chunk": [ChunkStorageMetadata(torch.Size((0, 2)), torch.Size((3, 4)))] * 3, "n": [1.5, 2**70, "text", ()]}
    content, drawn, refused = pickle.dumps(value, protocol=4), random.Random(0), 0
    damaged = [content[:cut] for cut in range(len(content))]
    for _ in range(2000):
        changed = bytearray(content)
        changed[drawn.randrange(len(changed))] = drawn.randrange(256)
        damaged.append(bytes(changed))
    for each in damaged:
        try:
            read(each)
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
    assert refused > len(content)


def test_a_claim_of_much_memory_costs_none() -> None:
    """A memo index and a length of 4 GiB each, which pickle's own reader makes room for."""
    for content in (b"\x80\x04Nr\xff\xff\xff\xff.", b"\x80\x04\x8e\xff\xff\xff\xff\x00\x00\x00\x00x."):
        try:
            assert read(content) is None
        except UserError as error:
            assert "not a whole pickle" in str(error)
