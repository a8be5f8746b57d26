"""Safetensors files written as a stream, hashed while they are written.

The library's own writer wants every tensor of a file in memory at once and refuses tensors that share storage, which
the pieces of a flat optimizer buffer do.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import atomic_file
from minicpm_megatron.storage.checksum import FileRecord

DTYPE_NAMES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_ALIGNMENT = 8


def open_safetensors(path: Path, fix: str) -> Any:
    """The library's lazy handle on a file; closed when it is let go.

    Raises:
        UserError: with `fix` where the file is missing; it is cut short or malformed.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError("missing", where=str(path), fix=fix) from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"not a whole safetensors file: {error}", where=str(path)) from None


def write_safetensors(
    path: Path, tensors: Iterable[tuple[str, torch.Tensor]], metadata: Mapping[str, str]
) -> FileRecord:
    """Write `tensors` to `path`, whole or not at all; one tensor at a time is copied to the CPU.

    Args:
        tensors: (name, value) of any device; values are views until it is their turn.
        metadata: free text in the file's header.

    Raises:
        OSError: the disk is full or fails; no file is left behind.
    """
    listed = list(tensors)
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in listed}
    return write_stream(path, layout, iter(listed), metadata)


def write_stream(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> FileRecord:
    """`write_safetensors` for tensors that do not exist yet: each is taken, written and let go before the next.

    Args:
        layout: name -> type and shape, in the order in which the tensors come.
        tensors: as many as `layout` has are taken.

    Raises:
        ValueError: a tensor is not the one that `layout` announced.
        OSError: the disk is full or fails; no file is left behind.
    """
    digest, size = hashlib.sha256(), 0
    with atomic_file(path) as handle:
        for block in _blocks(layout, tensors, metadata):
            handle.write(block)
            digest.update(block)
            size += len(block)
            del block  # it holds the tensor, and the next one is about to be made
    return FileRecord(path.name, size, digest.hexdigest())


def _blocks(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    tensors: Iterator[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> Iterator[bytes | memoryview]:
    """The file's bytes: length of the header, header, data."""
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in layout.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    yield len(text).to_bytes(8, "little") + text
    for announced, (dtype, shape) in layout.items():
        name, tensor = next(tensors)
        if (name, tensor.dtype, tuple(tensor.shape)) != (announced, dtype, shape):
            raise ValueError(f"announced {announced} {dtype} {shape}, got {name} {tensor.dtype} {tuple(tensor.shape)}")
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
        del tensor
