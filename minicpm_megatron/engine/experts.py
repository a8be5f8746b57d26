"""Expert parallelism as DeepSpeed 0.19 wants to see it, over Megatron-Core's layers and groups.

DeepSpeed takes a parameter for an expert's by `allreduce=False`, as Megatron-Core marks those that its ranks share. It
then wants: a `group_name` on it, under which `deepspeed.utils.groups` knows the ranks that hold the same experts; an
optimizer group of that name with "moe" set; and one module of its own class MoE in the model, or it looks for none of
this. Without expert parallelism experts are parameters like others and none of it is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from deepspeed.runtime.utils import get_global_norm_of_tensors, get_norm_with_moe_layers
from deepspeed.utils import groups as deepspeed_groups
from megatron.core import parallel_state

from minicpm_megatron.recipe import Layout

GROUP = "expert"  # the muP role; DeepSpeed reads a group's name as that of its ranks


class _ExpertsAreHere(MoE):
    """Tells DeepSpeed that a model has experts; computes nothing."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)
        self.num_experts = 0

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """The groups are Megatron-Core's."""


def is_divided(parameter: torch.nn.Parameter) -> bool:
    """Whether expert-parallel ranks hold different parameters in the place of this one."""
    return not getattr(parameter, "allreduce", True)


def replica_of(parameter: torch.nn.Parameter) -> int:
    """Number of this rank among those that hold the same parameter."""
    if is_divided(parameter):
        return int(parallel_state.get_expert_data_parallel_rank())
    return int(parallel_state.get_data_parallel_rank(with_context_parallel=True))


def _only_group() -> str:
    """In the place of DeepSpeed's function that reads the size of an expert group out of its name."""
    return GROUP


def mark(param_groups: list[dict[str, Any]], layout: Layout) -> None:
    """Name the ranks of the divided experts, in DeepSpeed's groups, in the optimizer's and on the parameters."""
    deepspeed_groups._EXPERT_PARALLEL_GROUP.pop(GROUP, None)
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP.pop(GROUP, None)
    # above 1 the norm of experts, which tensor-parallel ranks have parts of, is summed over those, too
    deepspeed_groups.expert_tensor_parallel_world_size = parallel_state.get_expert_tensor_parallel_world_size()
    if layout.expert_model_parallel_size == 1:
        return
    deepspeed_groups._get_max_expert_size_name = _only_group
    deepspeed_groups._EXPERT_PARALLEL_GROUP[GROUP] = parallel_state.get_expert_model_parallel_group()
    deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP[GROUP] = parallel_state.get_expert_data_parallel_group()
    for group in param_groups:
        if group["name"] == GROUP:
            group["moe"] = True
            for parameter in group["params"]:
                parameter.group_name = GROUP


@contextlib.contextmanager
def shown_to_deepspeed(model: torch.nn.Module, layout: Layout) -> Iterator[None]:
    """While DeepSpeed looks at the model, let it find experts if they are divided."""
    if layout.expert_model_parallel_size == 1:
        yield
        return
    model.add_module("deepspeed_experts", _ExpertsAreHere())
    try:
        yield
    finally:
        del model.deepspeed_experts


def norm_of(gradients: tuple[list[torch.Tensor], dict[str, list[torch.Tensor]]], mpu: Any) -> Any:
    """2-norm of what BF16_Optimizer.get_grads_for_norm returns: gradients, and those of divided experts by group."""
    others, of_experts = gradients
    norm = get_global_norm_of_tensors(others, mpu=mpu)
    return get_norm_with_moe_layers(norm, mpu, of_experts) if of_experts else norm
