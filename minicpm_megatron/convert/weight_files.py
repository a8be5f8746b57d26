"""Folders of weights: safetensors or pytorch_model.bin, read lazily and with suspicion; safetensors written by shards.

An index is text that somebody else wrote: a file name in it that leaves the folder, or that is not of the index's kind,
is refused before anything is opened.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from minicpm_megatron.convert.config_fields import read_json
from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.convert.pickled_weights import PickledWeights
from minicpm_megatron.convert.weight_options import DTYPE_NAMES
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.storage.safetensors_file import open_safetensors, write_stream

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, whole) for name, whole in DTYPE_NAMES.items()}
_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_HEADER_ALLOWANCE = 2**20


class _Shard(Protocol):
    """The tensors of one file, by name."""

    def names(self) -> list[str]: ...
    def shape(self, name: str) -> Shape: ...
    def stored_type(self, name: str) -> str: ...
    def read(self, name: str) -> torch.Tensor: ...
    def rows(self, name: str, start: int, end: int) -> torch.Tensor: ...


class _Safetensors:
    """A safetensors file as a `_Shard`; only headers are read until a tensor is asked for."""

    def __init__(self, path: Path) -> None:
        self._handle = open_safetensors(path, fix="download it again")

    def names(self) -> list[str]:
        return list(self._handle.keys())

    def shape(self, name: str) -> Shape:
        return tuple(self._handle.get_slice(name).get_shape())

    def stored_type(self, name: str) -> str:
        return str(self._handle.get_slice(name).get_dtype())

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._handle.get_tensor(name)
        return tensor

    def rows(self, name: str, start: int, end: int) -> torch.Tensor:
        part: torch.Tensor = self._handle.get_slice(name)[start:end]
        return part


@dataclass(frozen=True)
class _Kind:
    """One way in which weights are published: in one file, or in several with an index."""

    index: str
    single: str
    open: Callable[[Path], _Shard]

    @property
    def suffix(self) -> str:
        return Path(self.single).suffix


# the first that is there is read, as transformers does
_KINDS = (
    _Kind(INDEX, SINGLE, _Safetensors),
    _Kind("pytorch_model.bin.index.json", "pytorch_model.bin", PickledWeights),
)


class WeightFolder:
    """The tensors of a folder by name, read one at a time.

    Raises:
        UserError: no weights in it that can be read, an index that is malformed or leads out of the folder, a missing,
            truncated or malformed shard, or a tensor that is listed and not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._kind = _kind(folder)
        self._open: dict[Path, _Shard] = {}
        self._files = self._weight_map()
        for path in sorted(set(self._files.values())):
            present = set(self._shard(path).names())
            listed = {name for name, file in self._files.items() if file == path}
            if absent := sorted(listed - present):
                raise UserError(f"tensor {absent[0]} is listed in the index and not in the file", where=str(path))
            if unlisted := sorted(present - listed):
                raise UserError(f"tensor {unlisted[0]} is in the file and not in the index", where=str(path))

    def _weight_map(self) -> dict[str, Path]:
        """Tensor name -> file."""
        index, single = self.folder / self._kind.index, self.folder / self._kind.single
        if not index.exists():
            return dict.fromkeys(self._shard(single).names(), single)
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise UserError("weight_map is missing or empty", where=str(index))
        for file in weight_map.values():
            plain = isinstance(file, str) and file == os.path.basename(file) and "\\" not in file and "\0" not in file
            if not plain or not file.endswith(self._kind.suffix):
                raise UserError(
                    f"weight_map names {file!r}, not a {self._kind.suffix} file of this folder", where=str(index)
                )
        return {name: self.folder / file for name, file in weight_map.items()}

    def _shard(self, path: Path) -> _Shard:
        if path not in self._open:
            self._open[path] = self._kind.open(path)
        return self._open[path]

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._files)

    def path(self, name: str) -> Path:
        """The file that holds `name`."""
        return self._files[name]

    def shape(self, name: str) -> Shape:
        """Shape of `name`, from the header."""
        return self._shard(self.path(name)).shape(name)

    def dtype(self, name: str) -> torch.dtype:
        """Stored type of `name`.

        Raises:
            UserError: not one of the three floating types that weights come in (quantised, for example).
        """
        stored = self._shard(self.path(name)).stored_type(name)
        if stored not in _STORED:
            raise UserError(
                f"tensor {name} is stored as {stored}", where=str(self.path(name)), fix=f"use {', '.join(_STORED)}"
            )
        return _STORED[stored]

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor in its stored type.

        Raises:
            UserError: a value is not finite.
        """
        return self._finite(name, self._shard(self.path(name)).read(name))

    def row_blocks(self, name: str, rows: int) -> Iterator[torch.Tensor]:
        """A matrix, `rows` rows at a time.

        Raises:
            UserError: a value is not finite.
        """
        shard = self._shard(self.path(name))
        for start in range(0, self.shape(name)[0], rows):
            yield self._finite(name, shard.rows(name, start, start + rows))

    def _finite(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not is_finite(tensor):
            raise UserError(
                f"tensor {name} has values that are not finite",
                where=str(self.path(name)),
                fix="download it again, or ask whoever made it",
            )
        return tensor


def _kind(folder: Path) -> _Kind:
    """How the weights in `folder` are published."""
    for kind in _KINDS:
        if (folder / kind.index).exists() or (folder / kind.single).exists():
            return kind
    pickled = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt"})
    if pickled:
        raise UserError(
            f"weights only as {pickled[0]}, which is neither safetensors nor pytorch_model.bin",
            where=str(folder),
            fix="save the model's state_dict() as pytorch_model.bin or, better, as model.safetensors",
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
    if not is_finite(cast):
        if is_finite(tensor):
            raise UserError(f"tensor {name} has values beyond the range of {dtype}", fix="use bf16 or fp32")
        raise UserError(f"tensor {name} has values that are not finite", fix="convert an earlier checkpoint")
    return cast


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether every value is finite."""
    # the extremes tell without a temporary of the tensor's size: a NaN anywhere makes both NaN
    return not tensor.numel() or all(bool(torch.isfinite(extreme)) for extreme in torch.aminmax(tensor))
