"""The gradient norm of ZeRO 1 in a pipeline, over all of a stage's parameter groups at once."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from minicpm_megatron.engine.zero.flat_gradients import FlatGradientOptimizer


class OneNormOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer, which reduces one norm instead of one a group.

    DeepSpeed 0.19.8 sums each group over the ranks of a copy of the model by itself. Stages do not have the same muP
    groups, since only the first and the last hold an embedding: those in between would leave the others waiting. Delete
    this class once DeepSpeed sums over groups before it reduces.
    """

    def scaled_global_norm(self, norm_type: int = 2) -> Any:
        """The 2-norm of all gradients of all ranks of a copy of the model."""
        if self.cpu_offload:  # which has the norms of gradients that have left the device
            parameters = [parameter for group in self.params_in_partition for parameter in group]
            return self.complete_grad_norm_calculation_for_cpu_offload(parameters)
        gradients: list[torch.Tensor] = []
        parameters = []
        for group in range(len(self.bit16_groups)):
            own = (part for part in self.averaged_gradients[group] if not getattr(part, "_zero_padding", False))
            for gradient, parameter in zip(own, self.params_in_partition[group], strict=True):
                gradients.append(gradient)
                parameters.append(parameter)
        return self.get_grad_norm_direct(gradients, parameters)


class OneNormFlatOptimizer(OneNormOptimizer, FlatGradientOptimizer):
    """Both: one norm, and gradients in buffers that stay."""
