"""Names that `--to` takes; loads neither torch nor a format."""

from __future__ import annotations

from minicpm_megatron import registry
from minicpm_megatron.convert.torch_dist import TORCH_DIST

MEGATRON = "megatron"
"""A checkpoint of ours."""
CHECKPOINTS = (MEGATRON, TORCH_DIST)
"""Targets that keep Megatron-Core's tensors; all others are published formats."""


def targets() -> tuple[str, ...]:
    """Published formats, other packages' among them, and `CHECKPOINTS`, whose names no package can take."""
    return (*(name for name in registry.FORMATS.names() if name not in CHECKPOINTS), *CHECKPOINTS)
