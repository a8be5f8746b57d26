"""Random tensors that depend on a seed and a name alone, not on what was drawn before or on how many ranks draw."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def normal(name: str, shape: tuple[int, ...], std: float, seed: int) -> torch.Tensor:
    """The whole tensor `name`: fp32 on the CPU, normal with deviation `std`."""
    import torch

    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    return torch.empty(shape).normal_(0.0, std, generator=generator)
