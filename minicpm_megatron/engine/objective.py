"""What the engine minimises: a function of a micro-batch's token losses and of what its samples carry beside them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

Objective = Callable[[Tensor, Mapping[str, Tensor]], Tensor]
"""(token losses, fp32 [b, s] in nats; name -> tensor of a field of the samples) -> a scalar in nats.

The engine takes the mean of the scalars over the step's micro-batches and over the ranks that read different tokens,
context-parallel ranks among them, whose token losses are those of their part of each sequence.
"""


def mean_token_loss(token_losses: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
    """Mean cross-entropy over the micro-batch."""
    return token_losses.mean()


def split_fields(batch: tuple[Any, ...]) -> tuple[tuple[Tensor, ...], Mapping[str, Tensor]]:
    """A micro-batch as what the model reads, and the fields of its samples, a mapping at its end where it has any."""
    return (batch[:-1], batch[-1]) if isinstance(batch[-1], Mapping) else (batch, {})
