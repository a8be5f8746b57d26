"""Small checkpoints whose content tells their step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from minicpm_megatron.checkpoint import Checkpointer
from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.storage.sharded import CheckpointReader, Fragment, ShardSpec

ROWS = 64


def save(checkpointer: Checkpointer, step: int, content: int | None = None, rows: int = ROWS) -> Path:
    """Save a tensor full of `content` (default: the step), half of it on each of two ranks."""
    rank, size = checkpointer.ranks.rank, checkpointer.ranks.size
    mine = rows // size
    spec = ShardSpec("w", (rows, 8), 0, ((rank * mine, mine),))
    tensor = torch.full((mine * 8,), float(step if content is None else content))
    return checkpointer.save(
        step,
        [Fragment(spec, "param", 0, tensor)],
        rank_tensors={"random": torch.full((3,), rank, dtype=torch.uint8)},
        state=RunState(step=step),
        facts={},
    )


def content(folder: Path) -> int:
    """The number a checkpoint is full of; fails where it is not whole."""
    found = CheckpointReader(folder).read("w").unique()
    assert found.numel() == 1
    return int(found)


def names(directory: Path) -> list[str]:
    """What stands in a run's checkpoints/, without the lock."""
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def world(directory: Path, **settings: Any) -> Checkpointer:
    """A checkpointer over every rank of the job."""
    return Checkpointer(directory, group=dist.group.WORLD, **settings)
