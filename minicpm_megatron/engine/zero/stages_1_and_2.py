"""ZeRO 1 in fp32, and ZeRO 2: DeepSpeed's DeepSpeedZeroOptimizer, with averaged gradients of each rank's partition."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from minicpm_megatron.engine.zero.flat_gradients import FlatGradientOptimizer
from minicpm_megatron.engine.zero.flat_partitions import FlatPartitions
from minicpm_megatron.engine.zero.one_norm import OneNormFlatOptimizer, OneNormOptimizer
from minicpm_megatron.engine.zero.partitioned import Offloaded
from minicpm_megatron.recipe import Layout, Recipe


class Stages1And2(FlatPartitions):
    """ZeRO 1 in fp32, and ZeRO 2 in either precision."""

    builds = DeepSpeedZeroOptimizer

    def __init__(self, recipe: Recipe, layout: Layout, config: dict[str, Any]) -> None:
        super().__init__(recipe, layout, config)
        if layout.pipeline_model_parallel_size > 1:
            self.optimizer_class = OneNormOptimizer

    def _norm(self) -> Any:
        return self.optimizer.scaled_global_norm()

    def _gradients(self) -> list[Tensor]:
        return [gradient for group in self.optimizer.averaged_gradients.values() for gradient in group]


class FlatStage1(Stages1And2):
    """ZeRO 1 in fp32 on CPU, with gradients in buffers that stay (`flat_gradients`)."""

    def __init__(self, recipe: Recipe, layout: Layout, config: dict[str, Any]) -> None:
        super().__init__(recipe, layout, config)
        pipelined = layout.pipeline_model_parallel_size > 1
        self.optimizer_class = OneNormFlatOptimizer if pipelined else FlatGradientOptimizer


class OffloadedStages1And2(Offloaded, Stages1And2):
    """ZeRO 1 and 2 with the optimizer in the host's memory, in either precision."""

    def _forget_skipped(self) -> None:
        # DeepSpeed 0.19.8 would add a skipped step's offloaded gradients to those of the next
        gradients = self.optimizer.averaged_gradients
        gradients.update(dict.fromkeys(gradients))
