"""Global tensors of a torch_dist folder put together from their chunks, one at a time."""

from __future__ import annotations

import io
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.convert.torch_dist.contents import Chunk, Contents, Extent, StoredTensor
from minicpm_megatron.errors import UserError

_FIX = "restore it or use another checkpoint"


class Region(NamedTuple):
    """The part of a global tensor at one index of its first dimensions; a whole tensor has none.

    Attributes:
        key: name of the global tensor.
        at: for instance (layer,), or (layer, expert).
        sizes: of the dimensions that are indexed, as the model has them.
    """

    key: str
    at: Shape = ()
    sizes: Shape = ()


class ChunkReader:
    """Reads regions of the tensors of a folder, whatever chunks the ranks that saved it held.

    Args:
        folder: holds the files that `contents` names.
    """

    def __init__(self, folder: Path, contents: Contents) -> None:
        self._folder, self._contents = folder, contents
        # a chunk that spans layers or experts is asked for once for each of them
        self._last: tuple[Chunk, Tensor] | None = None

    def check(self, region: Region) -> None:
        """Refuse a region that cannot be read, by the table of contents and the files' sizes.

        Raises:
            UserError: chunks overlap or leave a gap, or a file is missing or too short.
        """
        stored, parts = self._contents.tensors[region.key], self._parts(region)
        shape = stored.shape[len(region.at) :]
        boxes = [_inner(chunk, region) for chunk in parts]
        whole = sum(math.prod(sizes) for _, sizes in boxes) == math.prod(shape)
        within = all(o + s <= w for offsets, sizes in boxes for o, s, w in zip(offsets, sizes, shape, strict=True))
        # boxes inside a shape, of its volume together and with nothing in common, cover it
        if not (whole and within) or any(_meet(*pair) for pair in itertools.combinations(boxes, 2)):
            raise UserError(f"{region.key} is not stored whole: its chunks overlap or leave a gap", where=self._where)
        for chunk in parts:
            check_extent(self._folder, chunk.extent)

    def read(self, region: Region) -> Tensor:
        """The values of a region that was checked, in their stored type.

        Raises:
            UserError: a chunk is damaged, or is not what the table of contents says.
        """
        stored = self._contents.tensors[region.key]
        shape = stored.shape[len(region.at) :]
        whole: Tensor | None = None
        for chunk in self._parts(region):
            inner = tuple(place - start for place, start in zip(region.at, chunk.offsets, strict=False))
            piece = self._load(region.key, stored, chunk, keep=math.prod(chunk.sizes[: len(inner)]) > 1)[inner]
            if tuple(piece.shape) == shape:
                return piece
            if whole is None:
                whole = piece.new_empty(shape)
            offsets, sizes = _inner(chunk, region)
            whole[tuple(slice(o, o + s) for o, s in zip(offsets, sizes, strict=True))] = piece
            del piece  # or two chunks would be in memory while the next one is read
        assert whole is not None, "check() refuses a region without chunks"
        return whole

    @property
    def _where(self) -> str:
        return str(self._folder)

    def _parts(self, region: Region) -> list[Chunk]:
        return [
            chunk
            for chunk in self._contents.tensors[region.key].chunks
            if all(o <= place < o + s for place, o, s in zip(region.at, chunk.offsets, chunk.sizes, strict=False))
        ]

    def _load(self, key: str, stored: StoredTensor, chunk: Chunk, *, keep: bool) -> Tensor:
        if self._last is not None and self._last[0] == chunk:
            return self._last[1]
        where = str(self._folder / chunk.extent.file)
        content = io.BytesIO(read_extent(self._folder, chunk.extent))
        try:
            tensor: Tensor = torch.load(content, map_location="cpu", weights_only=True)
        except Exception as error:  # of the zip reader, the unpickler, and what a damaged header makes of either
            said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            raise UserError(f"{key} is damaged: {said}", where=where, fix=_FIX) from None
        found = (tensor.dtype, tuple(tensor.shape)) if isinstance(tensor, Tensor) else type(tensor).__name__
        if found != (stored.dtype, chunk.sizes):
            raise UserError(
                f"a chunk of {key} is {found}, the table of contents says {(stored.dtype, chunk.sizes)}", where=where
            )
        self._last = (chunk, tensor) if keep else None
        return tensor


def check_extent(folder: Path, extent: Extent) -> None:
    """Raise UserError unless the file is there and long enough."""
    path = folder / extent.file
    try:
        size = path.stat().st_size
    except OSError:
        raise UserError("missing", where=str(path), fix=_FIX) from None
    if extent.start + extent.length > size:
        raise UserError(
            f"cut short: {size} bytes, {extent.start + extent.length} were written", where=str(path), fix=_FIX
        )


def read_extent(folder: Path, extent: Extent) -> bytes:
    """The bytes of an extent that was checked.

    Raises:
        UserError: the disk fails.
    """
    path = folder / extent.file
    try:
        with open(path, "rb") as handle:
            handle.seek(extent.start)
            return handle.read(extent.length)
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", where=str(path)) from None


def _inner(chunk: Chunk, region: Region) -> tuple[Shape, Shape]:
    """Offsets and sizes of a chunk inside a region."""
    depth = len(region.at)
    return chunk.offsets[depth:], chunk.sizes[depth:]


def _meet(first: tuple[Shape, Shape], second: tuple[Shape, Shape]) -> bool:
    """Return whether two boxes have an element in common."""
    return all(max(o, p) < min(o + s, p + t) for o, s, p, t in zip(*first, *second, strict=True))
