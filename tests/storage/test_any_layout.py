"""What one layout wrote, every other reads, bit for bit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.manifest import problems, write_manifest
from minicpm_megatron.storage.sharded import (
    CheckpointReader,
    Fragment,
    ShardSpec,
    rank_file,
    write_fragments,
    write_single,
)
from tests.storage.layouts import KINDS, MODEL, VOCABULARY, local, spec, state, values, write_layout

LAYOUTS = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2), (4, 1)]


@pytest.fixture(scope="module", params=LAYOUTS, ids=lambda layout: f"tp{layout[0]}-dp{layout[1]}")
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_layout(tmp_path_factory.mktemp("layout") / "step-1", *request.param)


def test_whole_tensors(folder: Path) -> None:
    reader = CheckpointReader(folder)
    assert problems(folder) == []
    assert set(reader.names()) == set(MODEL)
    for name in MODEL:
        assert reader.shape(name) == MODEL[name][0]
        assert sorted(reader.kinds(name)) == sorted(KINDS)
        for kind in KINDS:
            np.testing.assert_array_equal(reader.read(name, kind).numpy(), values(name, kind))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_shards_of_any_other_layout(folder: Path, size: int) -> None:
    reader = CheckpointReader(folder)
    for name in MODEL:
        for kind in KINDS:
            for rank in range(size):
                expected = local(name, kind, rank, size)
                read = reader.read_shard(spec(name, rank, size), kind, expected.shape)
                np.testing.assert_array_equal(read.numpy(), expected)


def test_padding_of_the_vocabulary_is_not_stored(folder: Path) -> None:
    stored = 0
    for path in folder.glob("rank-*.safetensors"):
        with safe_open(path, framework="np") as handle:
            keys = [key for key in handle.keys() if "/param/" in key and "embedding" in key]  # noqa: SIM118
            stored += sum(handle.get_tensor(key).size for key in keys)
    assert stored == VOCABULARY * MODEL["embedding.word_embeddings.weight"][0][1]


def test_each_rank_reads_what_it_alone_saved(tmp_path: Path) -> None:
    reader = CheckpointReader(write_layout(tmp_path / "step-1", 2, 1))
    assert reader.rank_tensors(1)["random"].tolist() == [1] * 4
    assert reader.rank_tensors(2) == {}


def test_a_model_of_another_shape_is_refused(tmp_path: Path) -> None:
    reader = CheckpointReader(write_layout(tmp_path / "step-1", 1, 1))
    with pytest.raises(UserError, match=r"\(6,\) in the checkpoint and \(7,\) in the model"):
        reader.read_shard(ShardSpec("decoder.final_layernorm.weight", (7,)))


def _checkpoint(folder: Path, *pieces: Fragment) -> CheckpointReader:
    folder.mkdir()
    write_manifest(folder, [write_fragments(folder / rank_file(0), pieces, {})], state=state(1), facts={})
    return CheckpointReader(folder)


HALVES = [ShardSpec("w", (4, 3), 0, ((start, 2),)) for start in (0, 2)]
WHOLE = ShardSpec("w", (4, 3))


@pytest.mark.parametrize(
    "pieces",
    [
        [(WHOLE, 0, 11)],
        [(WHOLE, 1, 11)],
        [(WHOLE, 0, 5), (WHOLE, 6, 6)],
        [(WHOLE, 0, 7), (WHOLE, 6, 6)],
        [(WHOLE, 0, 12), (WHOLE, 0, 12)],
        [(HALVES[0], 0, 6)],
        [(HALVES[0], 0, 6), (HALVES[0], 0, 6)],
        [(HALVES[0], 0, 6), (HALVES[1], 0, 5)],
        [(WHOLE, 0, 12), (HALVES[1], 0, 6)],
        [(HALVES[0], 0, 6), (ShardSpec("w", (4, 3), 0, ((1, 3),)), 0, 9)],
        [(HALVES[0], 0, 6), (ShardSpec("w", (4, 3), 1, ((0, 3),)), 0, 12)],
    ],
    ids=str,
)
def test_gaps_and_overlaps_are_refused(tmp_path: Path, pieces: list[tuple[ShardSpec, int, int]]) -> None:
    written = [Fragment(spec, "param", start, torch.zeros(numel)) for spec, start, numel in pieces]
    reader = _checkpoint(tmp_path / "step-1", *written)
    with pytest.raises(UserError, match=r"\bw\b"):
        reader.read("w")


def test_weights_of_one_process(tmp_path: Path) -> None:
    tensors = {name: torch.from_numpy(values(name, "param")) for name in MODEL}
    write_single(tmp_path / "model.part", iter(tensors.items()), {"num_layers": 1}, state(0))
    (tmp_path / "model.part").rename(tmp_path / "model")
    reader = CheckpointReader(tmp_path / "model")
    assert problems(tmp_path / "model") == [] and reader.names() == list(MODEL)
    assert reader.manifest["model"] == {"num_layers": 1}
    for name, tensor in tensors.items():
        assert torch.equal(reader.read(name), tensor) and reader.kinds(name) == ["param"]
    with pytest.raises(UserError, match="holds no exp_avg of"):
        reader.read(name, "exp_avg")
