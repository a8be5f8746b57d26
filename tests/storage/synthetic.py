"""A synthetic model as ranks of any layout would hold it, made without the package's own cutting code."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from minicpm_megatron.storage.checksum import FileRecord
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.storage.sharded import Fragment, ShardSpec, rank_file, write_fragments

KINDS = ("param", "exp_avg", "exp_avg_sq")
VOCABULARY, PADDED, HIDDEN, FFN = 13, 16, 6, 8
SHAPES = {
    "embedding.word_embeddings.weight": (VOCABULARY, HIDDEN),
    "decoder.layers.0.self_attention.linear_proj.weight": (HIDDEN, FFN),
    "decoder.layers.0.mlp.linear_fc1.weight": (2 * FFN, HIDDEN),
    "decoder.final_layernorm.weight": (HIDDEN,),
}


def tensors(seed: int) -> dict[tuple[str, str], Tensor]:
    """(name, kind) -> global tensor."""
    generator = torch.Generator().manual_seed(seed)
    return {(name, kind): torch.randn(shape, generator=generator) for name, shape in SHAPES.items() for kind in KINDS}


def shard(name: str, whole: Tensor, tp: int, rank: int) -> tuple[ShardSpec, Tensor]:
    """What tensor-parallel rank `rank` of `tp` holds, padding included."""
    shape = SHAPES[name]
    if "norm" in name:
        return ShardSpec(name, shape), whole
    if "embedding" in name:
        rows = PADDED // tp
        padded = torch.cat([whole, torch.full((PADDED - VOCABULARY, HIDDEN), 7.0)])
        valid = max(0, min(rows, VOCABULARY - rank * rows))
        return ShardSpec(name, shape, 0, ((min(rank * rows, VOCABULARY), valid),)), padded[rank * rows :][:rows]
    if "fc1" in name:
        part = FFN // tp
        gate, up = whole[:FFN][rank * part :][:part], whole[FFN:][rank * part :][:part]
        return ShardSpec(name, shape, 0, ((rank * part, part), (FFN + rank * part, part))), torch.cat([gate, up])
    columns = FFN // tp
    return ShardSpec(name, shape, 1, ((rank * columns, columns),)), whole[:, rank * columns : (rank + 1) * columns]


def fragments(
    values: dict[tuple[str, str], Tensor], tp: int, dp: int, tp_rank: int, dp_rank: int
) -> Iterator[Fragment]:
    """ZeRO's way: all shards of a rank in one flat buffer, cut into `dp` equal parts with padding at the end."""
    for kind in KINDS:
        position, pieces = 0, []
        for name in SHAPES:
            spec, local = shard(name, values[name, kind], tp, tp_rank)
            pieces.append((spec, position, local.reshape(-1)))
            position += local.numel()
        size = -(-position // dp)
        flat = torch.cat([piece for _, _, piece in pieces] + [torch.zeros(size * dp - position)])
        low, high = dp_rank * size, (dp_rank + 1) * size
        for spec, start, local in pieces:
            first, last = max(low, start), min(high, start + local.numel())
            if first < last and (spec.dim is not None or tp_rank == 0):
                yield Fragment(spec, kind, first - start, flat[first:last])


def write(folder: Path, values: dict[tuple[str, str], Tensor], *, step: int, tp: int = 1, dp: int = 1) -> Path:
    """A checkpoint folder as tp x dp ranks would leave it."""
    folder.mkdir(parents=True)
    files: list[FileRecord] = []
    for rank in range(tp * dp):
        parts = fragments(values, tp, dp, rank % tp, rank // tp)
        own = {"torch": torch.full((4,), rank, dtype=torch.uint8)}
        files.append(write_fragments(folder / rank_file(rank), parts, own))
    write_manifest(folder, files, state={"step": step}, facts={"files_written": [asdict(file) for file in files]})
    return folder
