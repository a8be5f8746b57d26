"""Names that `--to` takes; loads neither torch nor a format."""

from __future__ import annotations

from minicpm_megatron.convert.torch_dist import TORCH_DIST

MEGATRON = "megatron"
"""A checkpoint of ours."""
CHECKPOINTS = (MEGATRON, TORCH_DIST)
"""What is written with Megatron-Core's tensors, and so is no published format."""


def targets() -> tuple[str, ...]:
    """Published formats and `CHECKPOINTS`."""
    return ("minicpm", "llama", "granite", "mixtral", "granitemoe", *CHECKPOINTS)
