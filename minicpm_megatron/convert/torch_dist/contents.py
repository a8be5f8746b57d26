"""The table of contents of a torch_dist folder: its tensors, and their bytes in its files.

`.metadata` is a pickle of torch's `Metadata`. It is read as data, and every name in it that is none of torch's
distributed checkpoint is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.pickle_as_data import Description, Name, read_pickle_as_data

METADATA = ".metadata"
_MODULES = tuple(f"torch.distributed.checkpoint.{module}." for module in ("metadata", "planner", "filesystem"))
_NAMES = {
    "torch.Size",
    "torch.serialization._get_layout",
    "collections.OrderedDict",
    "pathlib.Path",
    "pathlib.PosixPath",
    # classes of earlier releases' checkpoints, of which Megatron-Core 0.19 keeps empty ones
    "megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata",
    "megatron.core.dist_checkpointing.strategies.torch.MCoreSavePlan",
}
# raised where the description is not that of a Metadata
_MALFORMED = (AttributeError, KeyError, IndexError, TypeError, ValueError)


@dataclass(frozen=True)
class Extent:
    """Bytes of a file of the folder."""

    file: str
    start: int
    length: int


@dataclass(frozen=True)
class Chunk:
    """A box of a global tensor, and where a torch.save of its values is."""

    offsets: Shape
    sizes: Shape
    extent: Extent


@dataclass(frozen=True)
class StoredTensor:
    """A global tensor."""

    dtype: torch.dtype
    shape: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Contents:
    """Contents of a folder.

    Attributes:
        tensors: name -> global tensor.
        objects: name -> torch.save of any other object.
    """

    tensors: dict[str, StoredTensor]
    objects: dict[str, Extent]


def read_contents(folder: Path) -> Contents:
    """The table of contents of `folder`.

    Raises:
        UserError: it is missing, damaged, names code, or names a file outside the folder.
    """
    path = folder / METADATA
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None
    metadata = read_pickle_as_data(content, _allowed, where=str(path))
    try:
        return _contents(metadata)
    except _MALFORMED:
        raise UserError("not the table of contents of a torch distributed checkpoint", where=str(path)) from None
    except UserError as error:
        raise UserError(error.what, where=str(path), fix=error.fix) from None


def _allowed(name: str) -> bool:
    return name in _NAMES or name.startswith(_MODULES) or is_dtype(name)


def is_dtype(name: str) -> bool:
    """Return whether a description is torch.float32 or another dtype."""
    return _dtype(name) is not None


def _dtype(name: str) -> torch.dtype | None:
    module, _, attribute = name.partition(".")
    found = getattr(torch, attribute, None) if module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _contents(metadata: Description) -> Contents:
    extents: dict[tuple[str, Shape | None], Extent] = {}
    for index, info in metadata.state["storage_data"].items():
        offset = index.state.get("offset")
        extents[index.state["fqn"], None if offset is None else _sizes(offset)] = _extent(info.state)
    tensors, objects = {}, {}
    for name, entry in metadata.state["state_dict_metadata"].items():
        if entry.made_by.endswith(".BytesStorageMetadata"):
            objects[name] = extents[name, None]
            continue
        dtype, shape = entry.state["properties"].state[0], _sizes(entry.state["size"])
        boxes = [(_sizes(chunk.state["offsets"]), _sizes(chunk.state["sizes"])) for chunk in entry.state["chunks"]]
        chunks = tuple(Chunk(offsets, sizes, extents[name, offsets]) for offsets, sizes in boxes)
        tensors[name] = StoredTensor(_known_dtype(name, dtype), shape, chunks)
    return Contents(tensors, objects)


def _known_dtype(name: str, dtype: Name) -> torch.dtype:
    known = _dtype(dtype.text)
    if known is None:
        raise UserError(f"tensor {name} is stored as {dtype.text}")
    return known


def _extent(info: dict[str, Any]) -> Extent:
    file, start, length = info["relative_path"], info["offset"], info["length"]
    if not isinstance(file, str) or file != Path(file).name or file in ("", ".", "..") or "\0" in file:
        raise UserError(f"names {file!r}, which is not a file of this folder")
    if info.get("transform_descriptors"):
        raise UserError(f"{file} was written through {info['transform_descriptors']}", fix="save without extensions")
    if not isinstance(start, int) or not isinstance(length, int) or start < 0 or length < 0:
        raise ValueError("no extent")
    return Extent(file, start, length)


def _sizes(value: Any) -> Shape:
    """A torch.Size, which is pickled as a call of it with one tuple, or a tuple."""
    sizes = value.arguments[0] if isinstance(value, Description) else value
    if not all(type(size) is int and size >= 0 for size in sizes):
        raise ValueError("not sizes")
    return tuple(sizes)
