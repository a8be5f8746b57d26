"""Shards of a published folder against the tensors that it was exported from."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.shards import SourceShards
from minicpm_megatron.convert.weight_files import WeightFolder
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sharded import WEIGHT, ShardSpec
from tests.convert.conftest import CASES, EXPERTS, MakeCheckpoint, named, random_tensors, read_checkpoint


@pytest.mark.parametrize(("target", "kind"), [("minicpm", {}), ("granitemoe", EXPERTS)], ids=["dense", "experts"])
def test_every_shard_is_the_part_of_its_tensor(
    target: str, kind: dict, checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    folder = checkpoint(num_layers=2, **kind)
    convert(folder, tmp_path / "out", target, dtype="fp32")
    shards, expected = SourceShards(open_source(tmp_path / "out")), read_checkpoint(folder)
    for name, whole in reversed(expected.items()):  # stages and ranks ask in orders of their own
        assert torch.equal(shards.read_shard(ShardSpec(name, tuple(whole.shape))), whole)
        rows, half = whole.size(0), whole.size(0) // 2
        second = ShardSpec(name, tuple(whole.shape), 0, ((half, rows - half),))
        padded = (rows, *whole.shape[1:])
        found = shards.read_shard(second, WEIGHT, padded)
        assert torch.equal(found[: rows - half], whole[half:]) and not found[rows - half :].any()
    name, whole = next(iter(expected.items()))
    for spec, message in (
        (ShardSpec("no.such", (2,)), "holds no param of no.such"),
        (ShardSpec(name, (3, *whole.shape[1:])), f"{name} is "),
    ):
        with pytest.raises(UserError, match=message):
            shards.read_shard(spec)
    with pytest.raises(UserError, match=f"holds no exp_avg of {name}"):
        shards.read_shard(ShardSpec(name, tuple(whole.shape)), "exp_avg")


@pytest.mark.parametrize(**named(CASES))
def test_in_the_order_of_the_model_every_tensor_is_read_once(
    target: str, kind: dict, checkpoint: MakeCheckpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = checkpoint(num_layers=2, **kind)
    convert(folder, tmp_path / "out", target, dtype="fp32")
    source, reads = open_source(tmp_path / "out"), Counter()
    read = WeightFolder.read

    def counted(self: WeightFolder, name: str) -> torch.Tensor:
        reads[name] += 1
        return read(self, name)

    monkeypatch.setattr(WeightFolder, "read", counted)
    shards = SourceShards(source)
    for name, tensor in random_tensors(source.model).items():  # an expert's two weights one after the other
        assert shards.read_shard(ShardSpec(name, tuple(tensor.shape))).shape == tensor.shape
    assert set(reads.values()) == {1}
