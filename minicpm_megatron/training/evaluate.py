"""Loss on held-out sets, per token and per byte of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.parallel import device
from minicpm_megatron.training.batches import BatchReader


@dataclass(frozen=True)
class HeldOut:
    """One held-out set.

    Attributes:
        reader: its samples, in a fixed order.
        batches: global batches to read, never more than the set has.
        global_batch_size: samples a global batch.
        bytes_per_token: of its text, to express the loss per byte, which tokenizers share (section 4.5 of the paper).
    """

    reader: BatchReader
    batches: int
    global_batch_size: int
    bytes_per_token: float


@torch.no_grad()
def evaluate(
    engine: Engine, sets: dict[str, HeldOut], on_batch: Callable[[str], None] = lambda name: None
) -> dict[str, dict[str, float]]:
    """Mean cross-entropy of every set in nats: name -> {"loss_per_token", "loss_per_byte"}; the same on all ranks.

    Args:
        on_batch: called with the name of the set before each global batch.
    """
    engine.eval()
    results = {}
    for name, held_out in sets.items():
        total = torch.zeros((), dtype=torch.float64, device=device.device())
        count = torch.zeros_like(total)
        for batch in range(held_out.batches):
            on_batch(name)
            first = batch * held_out.global_batch_size
            for micro_batch in held_out.reader.micro_batches(first, held_out.global_batch_size):
                total += engine.loss_sum(*micro_batch)
                count += micro_batch[0].numel()
        both = torch.stack([total, count])
        # ranks of one copy of the model see the same tokens: numerator and denominator grow alike
        dist.all_reduce(both)
        per_token = float(both[0] / both[1])
        results[name] = {"loss_per_token": per_token, "loss_per_byte": per_token / held_out.bytes_per_token}
    engine.train()
    return results
