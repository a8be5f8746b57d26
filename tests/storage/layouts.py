"""A small synthetic model and every way of dividing it over ranks, sliced here with numpy and not with the package."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.storage.sharded import Fragment, ShardSpec, rank_file, write_fragments

VOCABULARY, PADDED = 13, 16
HIDDEN, FEED_FORWARD = 6, 8
KINDS = ("param", "exp_avg", "exp_avg_sq")
# name -> (global shape, how tensor parallelism divides it)
MODEL: dict[str, tuple[tuple[int, ...], str]] = {
    "embedding.word_embeddings.weight": ((VOCABULARY, HIDDEN), "vocabulary"),
    "decoder.layers.0.self_attention.linear_proj.weight": ((HIDDEN, 4), "columns"),
    "decoder.layers.0.mlp.linear_fc1.weight": ((2 * FEED_FORWARD, HIDDEN), "gated"),
    "decoder.final_layernorm.weight": ((HIDDEN,), "whole"),
}


def values(name: str, kind: str) -> np.ndarray:
    """The global tensor, other numbers for each name and kind."""
    seed = list(MODEL).index(name) * 10 + KINDS.index(kind)
    return np.random.default_rng(seed).standard_normal(MODEL[name][0]).astype(np.float32)


def spec(name: str, rank: int, size: int) -> ShardSpec:
    """What tensor-parallel rank `rank` of `size` holds."""
    shape, split = MODEL[name]
    if split == "whole":
        return ShardSpec(name, shape)
    if split == "vocabulary":
        rows = PADDED // size
        start = min(rank * rows, VOCABULARY)
        return ShardSpec(name, shape, 0, ((start, min(rows, VOCABULARY - start)),))
    if split == "columns":
        width = shape[1] // size
        return ShardSpec(name, shape, 1, ((rank * width, width),))
    part = FEED_FORWARD // size
    return ShardSpec(name, shape, 0, ((rank * part, part), (FEED_FORWARD + rank * part, part)))


def local(name: str, kind: str, rank: int, size: int) -> np.ndarray:
    """The tensor in that rank's memory, the vocabulary padded with zeros."""
    whole, split = values(name, kind), MODEL[name][1]
    if split == "whole":
        return whole
    if split == "vocabulary":
        padded = np.zeros((PADDED, HIDDEN), np.float32)
        padded[:VOCABULARY] = whole
        return np.split(padded, size)[rank]
    if split == "columns":
        return np.split(whole, size, axis=1)[rank]
    gate, up = np.split(whole, 2)
    return np.concatenate([np.split(gate, size)[rank], np.split(up, size)[rank]])


def fragments(tensor_rank: int, tensor_size: int, data_rank: int, data_size: int) -> list[Fragment]:
    """What one rank saves where ZeRO divides every flat shard over the data-parallel ranks, with uneven pieces."""
    found = []
    for name, (_, split) in MODEL.items():
        if split == "whole" and tensor_rank:
            continue
        for kind in KINDS:
            flat = torch.from_numpy(local(name, kind, tensor_rank, tensor_size).copy()).view(-1)
            piece = math.ceil(flat.numel() / data_size)
            start = min(data_rank * piece, flat.numel())
            found.append(Fragment(spec(name, tensor_rank, tensor_size), kind, start, flat[start : start + piece]))
    return found


def write_layout(folder: Path, tensor_size: int, data_size: int) -> Path:
    """A checkpoint folder as tensor_size x data_size ranks would write it."""
    folder.mkdir(parents=True)
    records = []
    for rank in range(tensor_size * data_size):
        pieces = fragments(rank % tensor_size, tensor_size, rank // tensor_size, data_size)
        own = {"random": torch.full((4,), rank, dtype=torch.uint8)}
        records.append(write_fragments(folder / rank_file(rank), pieces, own))
    write_manifest(folder, records, state=state(1), facts={"model": {}})
    return folder


def state(step: int, **more: Any) -> dict[str, Any]:
    """The least a manifest needs to know."""
    return {"step": step, **more}
