"""ZeRO 1 on CPU without new memory in every step: gradients in flat buffers that stay, weights sent in place.

In fp32 DeepSpeed 0.19 copies every gradient into a bucket, the bucket into the buffer of an all-reduce, its result
back, this rank's part of it into one buffer and from there into another. What costs is less the copying than that all
of them are new in every step: memory comes from the kernel in pages of 4 KiB that it clears first, four times the size
of the gradients. Here a gradient is copied once, when backward has made it, and reduced, measured, clipped and stepped
in place, as torch's DistributedDataParallel and DeepSpeed's own BF16_Optimizer do. The arithmetic is DeepSpeed's; only
the order in which more than two ranks' gradients are added may be another.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime.zero import stage_1_and_2
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor
from torch.nn import Parameter

from minicpm_megatron.parallel import device


class FlatGradientOptimizer(DeepSpeedZeroOptimizer):
    """DeepSpeed's optimizer of ZeRO 1, its gradients in one persistent flat buffer a group.

    Of the JSON's settings `reduce_bucket_size` bounds one all-reduce here too, and those on scaling and dtype hold.
    Settings on how buckets are filled, reduced and scattered are ignored.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        # one buffer a group, laid out as the flat weights of the group
        self._flat: list[Tensor] = []
        self._places: dict[Parameter, Tensor] = {}
        self._partitions: list[Any] = []
        for index, weights in enumerate(self.bit16_groups_flat):
            flat = torch.zeros_like(weights)
            offsets = self.round_robin_bit16_offsets[index]
            for parameter, offset in zip(self.round_robin_bit16_groups[index], offsets, strict=True):
                self._places[parameter] = flat.narrow(0, offset, parameter.numel()).view_as(parameter)
            # DeepSpeed's own form of a partition's gradients that are flat already, its views moved into our buffer
            partition = self._build_compact_grad_partition_buffer(index)
            size, rank = self.partition_size[index], dist.get_rank(self.real_dp_process_group[index])
            partition.flat_partition = flat.narrow(0, rank * size, size)
            partition.move_flat_partition(flat.device)
            self._flat.append(flat)
            self._partitions.append(partition)

    def process_gradients(self, param: Any, i: int) -> None:
        """Called when backward has made or added to the gradient of `param`, of group `i`: bring it to its place."""
        place = self._places[param]
        if param.grad is not place:
            param.grad = place.copy_(param.grad)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """Average the gradients of a whole step over the data-parallel ranks."""
        # as in DeepSpeed, sums over context-parallel ranks keep all their digits
        dtype = torch.float32 if self.sequence_parallel_size > 1 else self.communication_data_type
        for index, group in enumerate(self.bit16_groups):
            for parameter in group:
                if parameter.grad is None:
                    self._places[parameter].zero_()
                else:  # with contiguous_gradients off, there was no hook that called it
                    self.process_gradients(parameter, index)
            for part in self._flat[index].split(self.reduce_bucket_size):
                self.gradient_reduction_w_predivide(part, dtype)
            self.averaged_gradients[index] = self._partitions[index]
        self._clear_param_grad_only()
        self._epilogue_ran_this_backward = True


def broadcast_partitions(groups_flat: Any, partitioned_param_groups: Any, dp_process_group: Any, **_: Any) -> None:
    """Every rank's updated weights to all others: DeepSpeed's `all_gather_dp_groups`, for gloo.

    gloo's all-gather writes all ranks' weights into a new buffer and copies them from there; its broadcast is in place.
    """
    handles = [
        dist.broadcast(partition, group=group, group_src=rank, async_op=True)
        for partitions, group in zip(partitioned_param_groups, dp_process_group, strict=True)
        if len(partitions) > 1
        for rank, partition in enumerate(partitions)
    ]
    for handle in handles:
        handle.wait()


def prepare() -> None:
    """Have weights sent by `broadcast_partitions` on CPU; safe to call more than once."""
    if device.on_cpu():
        for module in (stage_1_and_2, bf16_optimizer):
            module.all_gather_dp_groups = broadcast_partitions
