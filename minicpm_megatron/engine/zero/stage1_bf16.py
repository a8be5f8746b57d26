"""ZeRO 1 in bf16: DeepSpeed's BF16_Optimizer, with the fp32 sums of all gradients on every rank."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from torch import Tensor

from minicpm_megatron.engine import experts
from minicpm_megatron.engine.zero.adapter import Piece
from minicpm_megatron.engine.zero.flat_partitions import FlatPartitions


class Stage1Bf16(FlatPartitions):
    """ZeRO 1 in bf16, not offloaded."""

    builds = BF16_Optimizer

    def gradient(self, parameter: Any, piece: Piece) -> Tensor:
        """As `Adapter.gradient`: the piece's range of the whole parameter's sum."""
        return super().gradient(parameter, piece).narrow(0, piece.start, piece.master.numel())

    def _norm(self) -> Any:
        return experts.norm_of(self.optimizer.get_grads_for_norm(), self.optimizer.mpu)

    def _gradients(self) -> list[Tensor]:
        return self.optimizer.fp32_groups_gradients_flat
