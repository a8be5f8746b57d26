"""Committed counts: read, compared in one line each, written whole."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_megatron.storage.atomic import write_json

COUNTS = Path(__file__).with_name("counts.json")
KERNELS = Path(__file__).with_name("kernels.json")
COMMAND = "python -m tests.fake_cuda.record"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """{case: {quantity: value}}."""
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, counts: Mapping[str, Mapping[str, Any]]) -> None:
    """Replace the file by these."""
    write_json(path, counts)


def differences(case: str, was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each quantity of a case that changed; absent is 0."""
    lines = []
    for name in sorted({**was, **now}):
        before, after = was.get(name, 0), now.get(name, 0)
        if before == after:
            continue
        numbers = isinstance(before, int) and isinstance(after, int)
        advice = "a rise: mend it, or record it with its reason" if numbers and after > before else "record it"
        lines.append(f"{case}: {name}: was {before}, is {after}; {advice} ({COMMAND})")
    return lines
