"""Megatron's torch_dist checkpoints: global tensors in chunks, as `megatron.core.dist_checkpointing` saves them.

Written for megatron-core 0.19. Works without Megatron: the format is torch's distributed checkpoint with Megatron's
names. Nothing in a folder is unpickled but tensors, by torch's restricted unpickler.
"""

from __future__ import annotations

TORCH_DIST = "torch_dist"
