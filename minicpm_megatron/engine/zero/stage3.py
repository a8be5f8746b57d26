"""ZeRO 3: every data-parallel rank keeps a part of each parameter, of its gradient, master and moments."""

from __future__ import annotations

from typing import Any

import deepspeed
import torch
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.utils import safe_get_local_grad
from megatron.core import parallel_state
from torch import Tensor

from minicpm_megatron.engine.zero.adapter import Piece
from minicpm_megatron.engine.zero.partitioned import Offloaded, Partitioned
from minicpm_megatron.recipe import Layout, Recipe


class Stage3(Partitioned):
    """ZeRO 3 in either precision."""

    builds = DeepSpeedZeroOptimizer_Stage3

    def __init__(self, recipe: Recipe, layout: Layout, config: dict[str, Any]) -> None:
        super().__init__(recipe, layout, config)
        # where DeepSpeed 0.19.8 scatters gradients, it averages those of context-parallel ranks; elsewhere it sums them
        self.averages_over_context = config["zero_optimization"].get("reduce_scatter", True)

    def prepare_model(self, model: torch.nn.Module, dtype: torch.dtype, mpu: Any) -> None:
        """As `Adapter.prepare_model`: divide the weights over the context-parallel ranks, too.

        DeepSpeed 0.19.8 itself would divide them over the data-parallel ranks alone, and then look for their parts on
        the context-parallel ones. Delete this once it divides over both.
        """
        if self.layout.context_parallel_size > 1:
            deepspeed.zero.Init(
                module=model,
                data_parallel_group=parallel_state.get_data_parallel_group(with_context_parallel=True),
                dtype=dtype,
                config_dict_or_path=self.config,
                mpu=mpu,
            )

    def pieces(self, parameter: Any) -> list[Piece]:
        """As `Adapter.pieces`."""
        owner, address = self._place(parameter)
        size = parameter.ds_tensor.ds_numel
        start = size * parallel_state.get_data_parallel_rank(with_context_parallel=True)
        # the last partitions may be padding in part or whole
        valid = max(0, min(size, parameter.ds_numel - start))
        return [Piece(start, owner.data.narrow(0, address, valid), owner, address)] if valid else []

    def owner(self, parameter: Any, group: str) -> Tensor:
        """As `Adapter.owner`: the flat tensor of the parameter's sub-group, which DeepSpeed steps by itself."""
        return self._place(parameter)[0]

    def _place(self, parameter: Any) -> tuple[Tensor, int]:
        sub_group, address, _ = self.optimizer.grad_position[self.optimizer.get_param_id(parameter)]
        return self.optimizer.fp32_partitioned_groups_flat[sub_group], address

    def gradient(self, parameter: Any, piece: Piece) -> Tensor:
        """As `Adapter.gradient`."""
        found: Tensor = safe_get_local_grad(parameter)
        return found.view(-1)

    def shape(self, parameter: Any) -> tuple[int, ...]:
        """As `Adapter.shape`; the parameter itself is empty while no module uses it."""
        return tuple(parameter.ds_shape)

    def set_weights(self, parameter: Any, shard: Tensor) -> None:
        """As `Adapter.set_weights`."""
        self._set_masters(parameter, shard)
        for piece in self.pieces(parameter):
            parameter.ds_tensor.data.narrow(0, 0, piece.master.numel()).copy_(piece.master)
            parameter.ds_secondary_tensor = None  # ZeRO++'s second copy, which DeepSpeed makes anew from this one

    def _norm(self) -> Any:
        return combine_grad_norm_groups(self.optimizer._get_norm_groups())

    def _gradients(self) -> list[Tensor]:
        return [self.optimizer.grad_partitions_flat_buffer]


class OffloadedStage3(Offloaded, Stage3):
    """ZeRO 3 with the optimizer in the host's memory."""
