"""Loss on held-out sets, per token and per byte of text."""

from __future__ import annotations

import math
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
        samples: how many of them are read, from the first on; never more than the set has.
        label_bytes: sample -> UTF-8 bytes of text that its labels stand for, to express the loss per byte, which
            tokenizers share (section 4.5 of the paper); None where they are not known.
    """

    reader: BatchReader
    samples: int
    label_bytes: Callable[[int], float] | None


@torch.no_grad()
def evaluate(
    engine: Engine, sets: dict[str, HeldOut], on_batch: Callable[[str], None] = lambda name: None
) -> dict[str, dict[str, float | None]]:
    """Mean cross-entropy of every set in nats: name -> {"loss_per_token", "loss_per_byte"}; the same on all ranks.

    Every sample counts once, whatever the micro-batch size and the number of ranks. The loss per byte is None where
    the bytes of the tokens are not known.

    Args:
        on_batch: called with the name of the set before each micro-batch.
    """
    engine.eval()
    results: dict[str, dict[str, float | None]] = {}
    for name, held_out in sets.items():
        total = torch.zeros((), dtype=torch.float64, device=device.device())
        tokens, size = 0, 0.0
        for counted, micro_batch in held_out.reader.first_samples(held_out.samples):
            on_batch(name)
            total += engine.loss_sum(len(counted), *micro_batch)
            tokens += len(counted) * micro_batch[0].size(1)
            if held_out.label_bytes is not None:
                # context-parallel ranks share the tokens of a sample, and so its bytes
                size += sum(map(held_out.label_bytes, counted)) / held_out.reader.context_size
        sums = torch.stack([total, *torch.tensor([tokens, size], dtype=total.dtype, device=total.device)])
        # ranks of one copy of the model see the same tokens: numerator and denominators grow alike
        dist.all_reduce(sums)
        per_token, per_byte = (sums[0] / sums[1:]).tolist()
        # without bytes it is infinite
        results[name] = {"loss_per_token": per_token, "loss_per_byte": per_byte if math.isfinite(per_byte) else None}
    engine.train()
    return results
