"""Folders of safetensors: read lazily and with suspicion, written shard by shard.

An index is text that somebody else wrote: a file name in it that leaves the folder, or that is not safetensors, is
refused before anything is opened. Pickled weights (.bin, .pt) are never read, since reading them runs code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.storage.safetensors_file import open_safetensors, write_stream

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_LARGEST_JSON = 256 * 2**20
_HEADER_ALLOWANCE = 2**20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that somebody else wrote.

    Raises:
        UserError: absent, unreadable, too large, too deep, or not an object.
    """
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise UserError(f"larger than {_LARGEST_JSON >> 20} MiB", where=str(path))
        value = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"not readable as JSON: {error}", where=str(path)) from None
    if not isinstance(value, dict):
        raise UserError("not a JSON object", where=str(path))
    return value


class WeightFolder:
    """The tensors of a folder by name, read one at a time.

    Raises:
        UserError: no safetensors in it, an index that is malformed or leads out of the folder, a missing, truncated or
            malformed shard, or a tensor that is listed and not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = {name: folder / file for name, file in _weight_map(folder).items()}
        self._open: dict[Path, Any] = {}
        for path in sorted(set(self._files.values())):
            present = set(self._handle(path).keys())
            listed = {name for name, file in self._files.items() if file == path}
            if absent := sorted(listed - present):
                raise UserError(f"tensor {absent[0]} is listed in the index and not in the file", where=str(path))
            if unlisted := sorted(present - listed):
                raise UserError(f"tensor {unlisted[0]} is in the file and not in the index", where=str(path))

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path, fix="download it again")
        return self._open[path]

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._files)

    def path(self, name: str) -> Path:
        """The file that holds `name`."""
        return self._files[name]

    def shape(self, name: str) -> Shape:
        """Shape of `name`, from the header."""
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of `name`.

        Raises:
            UserError: not one of the three floating types that weights come in (quantised, for example).
        """
        stored = self._slice(name).get_dtype()
        if stored not in _STORED:
            raise UserError(
                f"tensor {name} is stored as {stored}", where=str(self.path(name)), fix=f"use {', '.join(_STORED)}"
            )
        return _STORED[stored]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored type."""
        return self._handle(self.path(name)).get_tensor(name)

    def row_blocks(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """A matrix, `rows` rows at a time."""
        view = self._slice(name)
        for start in range(0, self.shape(name)[0], rows):
            yield view[start : start + rows]

    def _slice(self, name: str) -> Any:
        return self._handle(self.path(name)).get_slice(name)


def _weight_map(folder: Path) -> dict[str, str]:
    """Tensor name -> file name inside `folder`."""
    index = folder / INDEX
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("weight_map is missing or empty", where=str(index))
        for file in weight_map.values():
            plain = isinstance(file, str) and file == os.path.basename(file) and "\\" not in file and "\0" not in file
            if not plain or not file.endswith(".safetensors"):
                raise UserError(f"weight_map names {file!r}, not a .safetensors file of this folder", where=str(index))
        return weight_map
    if (folder / SINGLE).exists():
        with open_safetensors(folder / SINGLE, fix="download it again") as handle:
            return dict.fromkeys(handle.keys(), SINGLE)
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise UserError(
            f"weights only as {pickled[0]}, a pickle, and reading one runs whatever code it holds",
            where=str(folder),
            fix="convert them to safetensors where they come from",
        )
    raise UserError(f"neither {INDEX} nor {SINGLE}", where=str(folder))


def plan_shards(shapes: Mapping[str, Shape], itemsize: int, max_bytes: int) -> list[tuple[str, list[str]]]:
    """Cut tensors, in order, into files of at most `max_bytes` of data; a larger tensor gets one of its own.

    Returns:
        (file name, tensor names) of each shard, named as transformers names them.
    """
    shards: list[list[str]] = []
    size = 0
    for name, shape in shapes.items():
        amount = itemsize * torch.Size(shape).numel()
        if not shards or size + amount > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += amount
    if len(shards) == 1:
        return [(SINGLE, shards[0])]
    return [(f"model-{n:05d}-of-{len(shards):05d}.safetensors", names) for n, names in enumerate(shards, start=1)]


def bytes_needed(shapes: Mapping[str, Shape], itemsize: int) -> int:
    """Disk space of the shards, with room for headers and the small files beside them."""
    return itemsize * sum(torch.Size(shape).numel() for shape in shapes.values()) + _HEADER_ALLOWANCE


def write_weights(
    folder: Path, tensors: Iterable[tuple[str, torch.Tensor]], shapes: Mapping[str, Shape], dtype: str, max_bytes: int
) -> list[str]:
    """Write shards and their index; in memory is one tensor at a time, whatever the size of the shards.

    Args:
        tensors: name and value in the order of `shapes`, any floating type, each in memory only when it is its turn.
        dtype: fp32, bf16 or fp16.
    Returns:
        the names of the shards.
    Raises:
        UserError: a weight that is not finite, or not in this type.
        OSError: the disk is full or fails.
    """
    itemsize = DTYPES[dtype].itemsize
    stream = iter(tensors)
    shards = plan_shards(shapes, itemsize, max_bytes)
    for file, names in shards:
        layout = {name: (DTYPES[dtype], tuple(shapes[name])) for name in names}
        write_stream(folder / file, layout, _cast_each(stream, len(names), dtype), {"format": "pt"})
    total = itemsize * sum(torch.Size(shape).numel() for shape in shapes.values())
    weight_map = {name: file for file, names in shards for name in names}
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return [file for file, _ in shards]


def _cast_each(
    stream: Iterator[tuple[str, torch.Tensor]], count: int, dtype: str
) -> Iterator[tuple[str, torch.Tensor]]:
    for _ in range(count):
        name, tensor = next(stream)
        tensor = cast_weight(name, tensor, dtype)
        yield name, tensor
        del tensor  # or this name would hold it while the next one is read


def cast_weight(name: str, tensor: torch.Tensor, dtype: str) -> torch.Tensor:
    """A weight in the type that is written.

    Args:
        dtype: fp32, bf16 or fp16.

    Raises:
        UserError: a value is not finite, or not in this type.
    """
    cast = tensor.to(DTYPES[dtype]).contiguous()
    if not _finite(cast):
        if _finite(tensor):
            raise UserError(f"tensor {name} has values beyond the range of {dtype}", fix="use bf16 or fp32")
        raise UserError(f"tensor {name} has values that are not finite", fix="convert an earlier checkpoint")
    return cast


def _finite(tensor: torch.Tensor) -> bool:
    # the extremes tell without a temporary of the tensor's size: a NaN anywhere makes both NaN
    return all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
