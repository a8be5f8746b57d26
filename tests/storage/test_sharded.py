"""What one layout wrote, every other reads bit for bit; what is not whole is refused by name."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.manifest import problems, write_manifest
from minicpm_megatron.storage.safetensors_file import write_safetensors
from minicpm_megatron.storage.sharded import CheckpointReader, Fragment, ShardSpec, write_fragments, write_single
from tests.storage import synthetic

LAYOUTS = [(1, 1), (2, 1), (1, 2), (1, 3), (2, 2), (4, 1), (2, 5), (8, 1)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: f"tp{layout[0]}-dp{layout[1]}")
def test_every_layout_reads_what_every_other_wrote(layout: tuple[int, int], tmp_path: Path) -> None:
    values = synthetic.tensors(0)
    tp, dp = layout
    reader = CheckpointReader(synthetic.write(tmp_path / "c", values, step=1, tp=tp, dp=dp))
    assert sorted(reader.names()) == sorted(synthetic.SHAPES)
    for (name, kind), whole in values.items():
        assert reader.shape(name) == tuple(whole.shape)
        assert set(reader.kinds(name)) == set(synthetic.KINDS)
        assert torch.equal(reader.read(name, kind), whole)
        for other, _ in LAYOUTS:
            for rank in range(other):
                spec, local = synthetic.shard(name, whole, other, rank)
                mine = reader.read_shard(spec, kind, tuple(local.shape))
                rows = spec.shape[0] if spec.dim == 0 and "embedding" in name else local.size(0)
                assert torch.equal(mine[:rows], local[:rows])
                assert not mine[rows:].any(), "padding rows are zero"
    for rank in range(tp * dp):
        assert reader.rank_tensors(rank)["torch"].tolist() == [rank] * 4
    assert reader.rank_tensors(tp * dp) == {}


def _one_tensor(folder: Path, pieces: list[tuple[ShardSpec, int, torch.Tensor]]) -> CheckpointReader:
    folder.mkdir()
    parts = [Fragment(spec, "param", start, values) for spec, start, values in pieces]
    record = write_fragments(folder / "rank-00000.safetensors", parts, {})
    write_manifest(folder, [record], state={"step": 1}, facts={})
    return CheckpointReader(folder)


ROWS = torch.arange(12.0)


@pytest.mark.parametrize(
    "pieces",
    {
        "a gap between fragments": [(None, 0, ROWS[:4]), (None, 8, ROWS[8:])],
        "overlapping fragments": [(None, 0, ROWS[:8]), (None, 4, ROWS[4:])],
        "the same fragment twice": [(None, 0, ROWS), (None, 0, ROWS)],
        "an end that is missing": [(None, 0, ROWS[:8])],
        "a shard that is missing": [(((0, 2),), 0, ROWS[:6])],
        "a gap and an overlap of one size": [(((0, 2),), 0, ROWS[:6]), (((1, 2),), 0, ROWS[3:9])],
        "overlapping shards": [(((0, 4),), 0, ROWS), (((1, 2),), 0, ROWS[3:9])],
    }.items(),
    ids=lambda item: item[0].replace(" ", "-"),
)
def test_tensors_that_are_not_stored_exactly_once_are_refused(pieces: tuple, tmp_path: Path) -> None:
    parts = [
        (ShardSpec("w", (4, 3), None if ranges is None else 0, ranges or ()), start, values)
        for ranges, start, values in pieces[1]
    ]
    reader = _one_tensor(tmp_path / "c", parts)
    with pytest.raises(UserError, match=r"\bw\b.*(gap|element|whole)|(gap|whole).*\bw\b"):
        reader.read("w")


def test_a_model_of_another_shape_is_refused_by_name(tmp_path: Path) -> None:
    reader = _one_tensor(tmp_path / "c", [(ShardSpec("w", (4, 3)), 0, ROWS)])
    with pytest.raises(UserError, match=r"w is \(4, 3\) in the checkpoint and \(3, 4\) in the model"):
        reader.read_shard(ShardSpec("w", (3, 4)))
    with pytest.raises(UserError, match="holds no exp_avg of w"):
        reader.read("w", "exp_avg")


@pytest.mark.parametrize("table", ["", "{", "[1]", '[{"name": "w"}]', "null", '[{"ranges": 5}]'])
def test_a_malformed_table_is_refused_with_its_file(table: str, tmp_path: Path) -> None:
    record = write_safetensors(tmp_path / "rank-00000.safetensors", [("0", ROWS)], {"fragments": table})
    write_manifest(tmp_path, [record], state={"step": 1}, facts={})
    with pytest.raises(UserError, match="rank-00000.safetensors.*malformed"):
        CheckpointReader(tmp_path)


def test_a_single_process_writes_a_checkpoint_under_a_temporary_name(tmp_path: Path) -> None:
    values = {name: whole for (name, kind), whole in synthetic.tensors(3).items() if kind == "param"}
    values["half"] = torch.randn(3, 5).to(torch.bfloat16)
    write_single(tmp_path / "imported.part", iter(values.items()), {"num_layers": 1}, {"step": 0})
    final = (tmp_path / "imported.part").rename(tmp_path / "imported")
    assert problems(final) == []
    reader = CheckpointReader(final)
    assert reader.names() == list(values) and reader.manifest["model"] == {"num_layers": 1}
    for name, whole in values.items():
        assert torch.equal(reader.read(name), whole) and reader.read(name).dtype == whole.dtype
    for name, (tp, rank) in itertools.product(synthetic.SHAPES, [(2, 0), (2, 1), (4, 3)]):
        spec, local = synthetic.shard(name, values[name], tp, rank)
        assert torch.equal(reader.read_shard(spec), local[: spec.shape[0]])
