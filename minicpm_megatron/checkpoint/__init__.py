"""Checkpoints: publish, verify, find and retain them, and read the state of a run from one, which needs no torch."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minicpm_megatron.checkpoint.checkpointer import Checkpointer, LoadedCheckpoint

__all__ = ["Checkpointer", "LoadedCheckpoint"]


def __getattr__(name: str) -> Any:
    # on first use: torch.distributed takes a second to import, and conversions need `run_state` alone
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("minicpm_megatron.checkpoint.checkpointer"), name)
