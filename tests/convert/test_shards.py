"""Shards of a published folder against the tensors that it was exported from."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minicpm_megatron.convert import convert, open_source
from minicpm_megatron.convert.shards import SourceShards
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sharded import WEIGHT, ShardSpec
from tests.convert.conftest import EXPERTS, MakeCheckpoint, read_checkpoint


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
