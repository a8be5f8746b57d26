"""The smallest recipe that is valid, as plain values for a test to change."""

from __future__ import annotations

from typing import Any


def minimal_fields(**changes: Any) -> dict[str, Any]:
    """Fields of a nano run; `section__key=value` replaces one of them, `section=value` a whole section."""
    fields: dict[str, Any] = {
        "name": "test",
        "preset": "minicpm-nano",
        "model": {},
        "data": {"train": [{"prefix": "corpus"}], "sequence_length": 64},
        "parallel": {},
        "training": {"global_batch_size": 8, "micro_batch_size": 2},
        "schedule": {"total": 100, "warmup": 10, "decay": 20, "half_life": 5},
        "deepspeed": {},
    }
    for key, value in changes.items():
        section, _, name = key.partition("__")
        if name:
            fields[section][name] = value
        else:
            fields[section] = value
    return fields
