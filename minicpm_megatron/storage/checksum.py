"""What identifies a file's content, and a folder's state."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any


def file_sha256(path: Path) -> str:
    """SHA-256 of a file in hex, read in blocks."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def content_sha256(content: dict[str, Any]) -> str:
    """SHA-256 of JSON values in one spelling, in hex, whatever the spaces and the order of keys in a file."""
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def fingerprint(folder: Path) -> str:
    """Of the names, sizes and times of change in a folder, in hex: where weights were replaced it is another."""
    files = sorted((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in folder.iterdir())
    return hashlib.sha256(repr(files).encode()).hexdigest()
