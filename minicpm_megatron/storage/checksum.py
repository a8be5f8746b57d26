"""What identifies a file's content, and a folder's state."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class FileRecord:
    """A file as it was written: name inside its folder, size in bytes, SHA-256 in hex."""

    name: str
    size: int
    sha256: str


def file_sha256(path: Path, on_block: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a file in hex, read in blocks of 4 MiB; `on_block` is called after each."""
    digest, block = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(path, "rb", buffering=0) as handle:
        while count := handle.readinto(block):
            digest.update(block[:count])
            on_block()
    return digest.hexdigest()


def content_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of JSON values in one spelling, in hex, whatever the spaces and the order of keys in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(folder: Path) -> str:
    """Of the names, sizes and times of change in a folder, in hex: where weights were replaced it is another."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    return hashlib.sha256(repr(files).encode()).hexdigest()
