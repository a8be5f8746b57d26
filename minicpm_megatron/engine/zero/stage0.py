"""ZeRO 0: every data-parallel rank keeps all gradients, masters and moments of its copy of the model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from minicpm_megatron.engine import experts
from minicpm_megatron.engine.zero.adapter import Adapter, Piece, Update, is_tied_copy
from minicpm_megatron.parallel import device
from minicpm_megatron.recipe import Layout, Recipe


class Whole(Adapter):
    """ZeRO 0 in fp32: DeepSpeed leaves the torch optimizer as it is.

    DeepSpeed would step before anyone can see that a gradient is not finite, and reports no norm, so that this
    adapter measures and clips (`config.clips_itself`).
    """

    builds = None
    divided = False

    def attach(self, engine: Any, inner: torch.optim.Optimizer, update: Callable[[], None]) -> None:
        """As `Adapter.attach`; from here on gradients are summed in fp32."""
        super().attach(engine, inner, update)
        _accumulate_in_fp32(engine.module)

    def gradient_norm(self) -> float:
        """As `Adapter.gradient_norm`."""
        return _gradient_norm(self._with_gradient(), self.layout)

    def discard(self) -> None:
        """As `Adapter.discard`."""
        self.engine.zero_grad()

    def step(self) -> Update:
        """As `Adapter.step`."""
        parameters = self._with_gradient()
        norm = _gradient_norm(parameters, self.layout)
        if not math.isfinite(norm):
            self.discard()  # the optimizer must not see it
            return Update(norm, applied=False)
        self._clip(parameters, norm)
        self._update()
        return Update(norm, applied=True)

    def pieces(self, parameter: Any) -> list[Piece]:
        """As `Adapter.pieces`: one, the whole shard."""
        master = self._master(parameter)
        return [Piece(0, master.data.view(-1), master, 0)]

    def owner(self, parameter: Any, group: str) -> Tensor:
        """As `Adapter.owner`."""
        return self._master(parameter)

    def gradient(self, parameter: Any, piece: Piece) -> Tensor:
        """As `Adapter.gradient`."""
        if parameter.grad is None:
            return torch.zeros_like(piece.master)
        return parameter.grad.detach().reshape(-1)

    def _master(self, parameter: Parameter) -> Tensor:
        return parameter

    def _clip(self, parameters: list[Parameter], norm: float) -> None:
        limit = self.recipe.training.gradient_clipping
        if limit and norm > limit:
            gradients: list[Any] = [parameter.grad for parameter in parameters]
            torch._foreach_mul_(gradients, limit / norm)

    def _with_gradient(self) -> list[Parameter]:
        return [parameter for parameter in self.engine.module.parameters() if parameter.grad is not None]


class UnfusedOptimizer(FP16_UnfusedOptimizer):
    """DeepSpeed's optimizer of bf16 at ZeRO 0, without its first step and with a norm that it is given.

    Attributes:
        whole_norm: the norm over all ranks of a copy of the model, by which it clips.
    """

    whole_norm = 0.0

    def initialize_optimizer_states(self) -> None:
        """Allocate no moments: the first update does.

        DeepSpeed 0.19.8 steps once with zero gradients. That is no step of ours: it decays the master weights, and
        Adam's bias correction then believes that the first update is its second and makes it a quarter smaller.
        Delete this override once moments are allocated without a step.
        """

    def unscale_and_clip_grads(self, total_norm: Any, apply_scale: bool = True) -> Any:
        """Clip by `whole_norm`: DeepSpeed 0.19.8 takes the norm of tensor-parallel rank 0's shards for that of all.

        Delete this override once `get_weight_norm` counts shards by `tensor_model_parallel`.
        """
        return super().unscale_and_clip_grads(self.whole_norm, apply_scale)


class WholeBf16(Whole):
    """ZeRO 0 in bf16: one fp32 master a parameter."""

    builds = FP16_UnfusedOptimizer

    def __init__(self, recipe: Recipe, layout: Layout, config: dict[str, Any]) -> None:
        super().__init__(recipe, layout, config)
        self.optimizer_class = UnfusedOptimizer

    def attach(self, engine: Any, inner: torch.optim.Optimizer, update: Callable[[], None]) -> None:
        """As `Adapter.attach`."""
        super().attach(engine, inner, update)
        low = [parameter for group in self.optimizer.fp16_groups for parameter in group]
        high = [master for group in self.optimizer.fp32_groups for master in group]
        self._masters = dict(zip(low, high, strict=True))

    def _master(self, parameter: Parameter) -> Tensor:
        return self._masters[parameter]

    def _clip(self, parameters: list[Parameter], norm: float) -> None:
        self.optimizer.whole_norm = norm


def _accumulate_in_fp32(model: torch.nn.Module) -> None:
    """Have autograd add each micro-batch's gradients to an fp32 `grad`, also where parameters are bf16.

    At ZeRO 0 DeepSpeed 0.19.8 keeps no gradients of its own and refuses `grad_accum_dtype`, so that micro-batches would
    be added in bf16: over 2,048 of them the norm comes out 11 % too small.
    """
    for parameter in model.parameters():
        parameter.grad = None
        parameter.grad_dtype = torch.float32


def _gradient_norm(parameters: list[Parameter], layout: Layout) -> float:
    """2-norm over the ranks of one copy of the model; a parameter that several of them hold is counted once."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    mine = [p for p in parameters if (rank == 0 or getattr(p, "tensor_model_parallel", False)) and not is_tied_copy(p)]
    divided = [p for p in mine if experts.is_divided(p)]
    square = _square([p for p in mine if not experts.is_divided(p)])
    dist.all_reduce(square, group=parallel_state.get_model_parallel_group())
    if layout.expert_model_parallel_size > 1:
        others = _square(divided)
        dist.all_reduce(others, group=parallel_state.get_expert_tensor_model_pipeline_parallel_group())
        square += others
    return float(square.sqrt())


def _square(parameters: list[Parameter]) -> Tensor:
    """Sum of the squares of all gradients, fp32."""
    if not parameters:
        return torch.zeros((), dtype=torch.float32, device=device.device())
    gradients: list[Any] = [parameter.grad for parameter in parameters]
    return torch.stack(torch._foreach_norm(gradients, dtype=torch.float32)).square().sum()
