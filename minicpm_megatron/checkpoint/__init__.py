"""What survives: publish, verify, find, retain."""

from minicpm_megatron.checkpoint.checkpointer import Checkpointer, LoadedCheckpoint

__all__ = ["Checkpointer", "LoadedCheckpoint"]
