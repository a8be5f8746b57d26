"""Megatron-Core's rotary embedding with every scaling of `methods.rope`.

Megatron-Core asks for the angles of the whole sequence, whatever part of it a rank holds under sequence or context
parallelism, and takes the rank's part afterwards. So the length that decides the base is the same on every rank.
"""

from __future__ import annotations

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from torch import Tensor

from minicpm_megatron.methods.rope import Rope


class MiniCPMRotaryEmbedding(RotaryEmbedding):
    """A `RotaryEmbedding` whose base may depend on the length of the sequence.

    Args:
        rope: channels, base and scaling.
        on_cpu: build the table on the CPU; otherwise on this rank's CUDA device.
        cp_group: the ranks that share a sequence; default: Megatron-Core's, if there are any.
    """

    def __init__(self, rope: Rope, *, on_cpu: bool, cp_group: torch.distributed.ProcessGroup | None = None) -> None:
        super().__init__(
            kv_channels=rope.channels,
            rotary_percent=1.0,
            rotary_base=rope.base_at(1),
            use_cpu_initialization=on_cpu,
            cp_group=cp_group,
        )
        self.rope = rope

    def get_freqs_non_repeated(self, max_seq_len: int, offset: int = 0) -> Tensor:
        """Angles of positions offset ... offset + max_seq_len - 1 of a sequence that ends there.

        Returns:
            fp32 [max_seq_len, channels / 2], in radians.
        """
        base = self.rope.base_at(max_seq_len + offset)
        if base == self.rope.base_at(1):
            return super().get_freqs_non_repeated(max_seq_len, offset)
        device, channels = self.inv_freq.device, self.rope.channels
        inverse = 1.0 / base ** (torch.arange(0, channels, 2, dtype=torch.float32, device=device) / channels)
        positions = torch.arange(max_seq_len, dtype=torch.float32, device=device) + offset
        return torch.outer(positions, inverse)
