"""Safetensors files written as a stream, hashed while they are written.

The library's own writer wants every tensor of a file in memory at once and refuses tensors that share storage, which
the pieces of a flat optimizer buffer do.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from minicpm_megatron.storage.atomic import PARTIAL_SUFFIX, fsync_directory

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


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: name inside its folder, size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


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
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in listed:
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    digest, size = hashlib.sha256(), 0
    partial = path.with_name(path.name + PARTIAL_SUFFIX)
    try:
        with open(partial, "wb") as handle:
            for block in _blocks(len(text).to_bytes(8, "little") + text, listed):
                handle.write(block)
                digest.update(block)
                size += len(block)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(partial, path)
        fsync_directory(path.parent)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return FileRecord(path.name, size, digest.hexdigest())


def _blocks(head: bytes, tensors: list[tuple[str, torch.Tensor]]) -> Iterable[bytes | memoryview]:
    yield head
    for _, tensor in tensors:
        if tensor.numel():
            yield tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
