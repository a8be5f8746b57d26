"""Cells that are done without having been run, with losses of the test's choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minicpm_megatron.recipe import Recipe, build
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.training.metrics import METRICS
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.progress import DONE


def base(folder: Path, **sections: Any) -> Recipe:
    """A recipe of 400 steps of 4 x 32 tokens; its tokens exist as far as a fingerprint needs them."""
    for name in ("train", "held-out"):
        for suffix in (".bin", ".idx"):
            (folder / f"{name}{suffix}").write_bytes(b"x")
    fields: dict[str, Any] = {
        "name": "base",
        "preset": "minicpm-nano",
        "data": {
            "train": [{"prefix": str(folder / "train")}],
            "validation": {"held-out": str(folder / "held-out")},
            "sequence_length": 32,
        },
        "training": {"global_batch_size": 4, "micro_batch_size": 4, "precision": "fp32"},
        "schedule": {"warmup": 10, "total": 400, "decay": 40, "decay_shape": "linear"},
    }
    for section, changes in sections.items():
        fields[section] = fields.get(section, {}) | changes
    return build(fields)


def pretend(cell: Cell, losses: float | Mapping[int, float], diverged: str | None = None) -> None:
    """Let `cell` be done, with held-out losses at steps, or at its last one; or let it have diverged."""
    by_step = losses if isinstance(losses, Mapping) else {cell.last_step: losses}
    cell.folder.mkdir(parents=True)
    lines = []
    for step, loss in by_step.items():
        lines.append({"kind": "train", "step": step, "seconds": 0.5})
        lines.append({"kind": "evaluation", "step": step, "set": "held-out", "loss_per_token": loss})
    (cell.folder / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_json(cell.folder / DONE, {"fingerprint": cell.fingerprint, "step": cell.last_step, "diverged": diverged})
