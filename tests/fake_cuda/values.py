"""Numbers that the host reads from fake tensors, which have none."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

SAMPLE = 4096  # tokens

routed = 0
"""Pairs of a token and an expert that a rank has in all: counts of tokens are even parts of them."""
documents = 0
"""Documents in a sample, equally long."""


def route_evenly(model: torch.nn.Module, pairs: int) -> None:
    """Let every expert have as many tokens as any other.

    Args:
        pairs: of a token and an expert that all ranks of a copy of the model have together in a micro-batch.
    """
    global routed
    routed = pairs
    for dispatcher in filter(None, (getattr(module, "token_dispatcher", None) for module in model.modules())):
        # the one list of numbers that are no counts of tokens: an order of experts, made with the dispatcher
        with unset_fake_temporarily():
            chunks = torch.arange(dispatcher.num_experts * dispatcher.tp_size)
            local = dispatcher.num_local_experts
            dispatcher.sort_input_by_local_experts = chunks.reshape(-1, local).T.ravel()
            dispatcher.restore_output_by_local_experts = chunks.reshape(local, -1).T.ravel()


def number(tensor: torch.Tensor) -> bool | int | float:
    """0, so that no flag is raised, no gradient is infinite and none is clipped."""
    if tensor.dtype == torch.bool:
        return False
    return 0.0 if tensor.dtype.is_floating_point else 0


def array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """The same for all elements. But integers are counts of tokens, if any are routed, or where documents begin."""
    shape = tuple(tensor.shape)
    if documents and shape == (documents,):
        return np.arange(documents) * (SAMPLE // documents)
    if tensor.dtype == torch.int64 and routed:
        assert routed % tensor.numel() == 0, f"{routed} tokens over {shape}"
        return np.full(shape, routed // tensor.numel())
    return np.full(shape, number(tensor))
