"""The statistics of section 4.4 (arXiv 2404.06395) in a running engine, each rank on what it holds.

Between two updates a rank keeps its own pieces of g(t) and x(t), which hold every element of the model once over all
ranks (`EngineState.owned`): of tensors that several ranks hold whole one keeps them, and under ZeRO each its own part.
Six dot products and one maximum are then reduced; no gradient is gathered. x is in fp32, the master weights where
there are any; g is the mean over the step's tokens before clipping.

The cost while a step is kept, of the P parameters of a rank that it answers for: 4 P bytes of weights, and P gradients
in the type that they are accumulated in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.methods.decay_statistics import DecaySums, decay_sums
from minicpm_megatron.parallel import device


@dataclass(frozen=True)
class GradientStatistics:
    """What is known of one step once the next gradient is.

    Attributes:
        sums: dot products of g(t), g(t+1) and v(t) = x(t+1) - x(t) over the whole model.
        max_gradient: max_i |g_i(t)|.
    """

    sums: DecaySums
    max_gradient: float

    @property
    def finite(self) -> bool:
        """Whether both gradients were."""
        return all(map(math.isfinite, self.sums.to_tensor().tolist()))


class ConsecutiveGradients:
    """Keeps one step's gradient and weights, and compares them with the next.

    All ranks call the same methods in the same steps, between `Engine.accumulate` and `Engine.step`.
    """

    def __init__(self, state: EngineState) -> None:
        self._state = state
        self._kept: list[tuple[Tensor, Tensor]] | None = None  # (gradient, weights) of each piece

    @torch.no_grad()
    def keep(self) -> None:
        """Copy this rank's pieces of the gradient and of the weights before the update, over those kept before."""
        if self._kept is None:
            self._kept = [(gradient.clone(), weights.clone()) for gradient, weights in self._pieces()]
            return
        for (gradient, weights), (new_gradient, new_weights) in zip(self._kept, self._pieces(), strict=True):
            gradient.copy_(new_gradient)
            weights.copy_(new_weights)

    def forget(self) -> None:
        """Free what is kept: the update was not made, or its step is not to be measured."""
        self._kept = None

    @torch.no_grad()
    def compare(self) -> GradientStatistics | None:
        """The statistics of the step that was kept, now that the next gradient is there; None where none was.

        The kept weights become the update; `keep` or `forget` must follow.
        """
        if self._kept is None:
            return None
        largest = torch.zeros((), dtype=torch.float64, device=device.device())
        for gradient, _ in self._kept:
            largest = torch.maximum(largest, torch.linalg.vector_norm(gradient, math.inf).to(largest))
        sums = decay_sums(self._triples(self._kept)).to_tensor(device.device())
        dist.all_reduce(sums)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return GradientStatistics(DecaySums.from_tensor(sums), float(largest))

    def _triples(self, kept: list[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (gradient, weights), (now, weights_now) in zip(kept, self._pieces(), strict=True):
            # x(t+1) - x(t) in the place of x(t): no third copy
            yield gradient, now, weights.neg_().add_(weights_now)

    def _pieces(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(gradient, weights) of what this rank answers for, 1-D, without padding, on the weights' device."""
        for parameter, spec, piece in self._state.owned():
            valid = min(piece.master.numel(), spec.numel - piece.start)
            if valid > 0:
                weights = piece.master.detach()[:valid]
                yield self._state.engine.zero.gradient(parameter, piece)[:valid].to(weights.device), weights
