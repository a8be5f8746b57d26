"""Which part of a sequence each context-parallel rank holds, in Megatron-Core's order.

With c ranks a sequence is cut in 2c chunks, and rank r holds chunk r followed by chunk 2c - 1 - r. The causal mask then
leaves every rank the same work.
"""

from __future__ import annotations

import torch
from torch import Tensor


def zigzag(tensor: Tensor, ranks: int, rank: int, dim: int) -> Tensor:
    """The part of a whole tensor that `rank` holds: chunks rank and 2 ranks - 1 - rank of dimension `dim`.

    Raises:
        ValueError: 2 ranks does not divide the dimension.
    """
    size = tensor.size(dim)
    if size % (2 * ranks):
        raise ValueError(f"a sequence of {size} does not divide into two chunks for each of {ranks} ranks")
    chunk = size // (2 * ranks)
    first, second = (tensor.narrow(dim, place * chunk, chunk) for place in (rank, 2 * ranks - 1 - rank))
    return torch.cat((first, second), dim)


def unzigzag(parts: list[Tensor], dim: int) -> Tensor:
    """The whole tensor of which `parts[rank]` is `zigzag(whole, len(parts), rank, dim)`."""
    chunk = parts[0].size(dim) // 2
    firsts = [part.narrow(dim, 0, chunk) for part in parts]
    seconds = [part.narrow(dim, chunk, chunk) for part in reversed(parts)]
    return torch.cat(firsts + seconds, dim)
