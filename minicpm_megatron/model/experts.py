"""The mixture of experts: Megatron-Core's MoELayer with a router and experts that run on CPU and CUDA alike.

A token's weights are the softmax over the logits of its k experts, which is the softmax over all experts renormalised
over the k (the published MiniCPM-MoE). No token is dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from torch import Tensor

from minicpm_megatron.parallel import device


@dataclass
class RouterLoad:
    """What one rank's router did since the load was last taken; sums over its micro-batches.

    Attributes:
        tokens: fp64 [experts], tokens sent to each.
        routed: tokens that came.
        entropy: of the softmax over all experts in nats, summed over tokens.
        auxiliary: this rank's parts of the load-balancing losses, without coefficient.
        calls: micro-batches.
    """

    tokens: Tensor
    routed: int = 0
    entropy: float | Tensor = 0.0
    auxiliary: float | Tensor = 0.0
    calls: int = 0


class MiniCPMRouter(TopKRouter):
    """Megatron-Core's TopKRouter in fp32, right under sequence parallelism, that keeps count of its experts' load."""

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        # Megatron-Core 0.19 makes the weight on the CPU and moves it in its own `gating`, which is not called here;
        # the counts of the load lie where the weight does
        with device.device():
            super().__init__(*arguments, **keywords)
        # Megatron-LM sums the gradients of weights marked so over the tensor-parallel ranks, which `gating` does itself
        self.weight.sequence_parallel = False
        self._load = self._no_load()

    def _no_load(self) -> RouterLoad:
        return RouterLoad(torch.zeros(self.num_experts, dtype=torch.float64, device=self.weight.device))

    def take_load(self) -> RouterLoad:
        """The load since the last call."""
        load, self._load = self._load, self._no_load()
        return load

    def gating(self, input: Tensor) -> Tensor:
        """[s, b, hidden_size] -> logits, fp32 [s, b, experts]."""
        weight = self.weight
        if self.config.sequence_parallel:
            # each tensor-parallel rank routes its own tokens: backward sums what they say of the one weight
            weight = copy_to_tensor_model_parallel_region(weight)
        # Megatron-Core 0.19's own copies the weight to a CUDA device where it is not on one
        return F.linear(input.float(), weight.float())

    def routing(self, logits: Tensor, *arguments: Any, **keywords: Any) -> tuple[Tensor, Tensor]:
        """Weights and map of tokens to experts, [s x b, experts] each; see TopKRouter."""
        probabilities, routing_map = super().routing(logits, *arguments, **keywords)
        if self.training and torch.is_grad_enabled():  # once a token, also where activations are computed again
            with torch.no_grad():
                scores = logits.view(-1, self.num_experts).log_softmax(-1)
                self._load.tokens += routing_map.sum(0)
                self._load.routed += routing_map.size(0)
                self._load.entropy += -(scores.exp() * scores).sum()
                self._load.calls += 1
        return probabilities, routing_map

    def attach_and_log_load_balancing_loss(
        self, activation: Tensor, aux_loss_coeff: float, aux_loss: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Let backward through `activation` add the gradient of the load-balancing loss; see TopKRouter."""
        self._load.auxiliary += aux_loss.detach() / aux_loss_coeff
        return MoEAuxLossAutoScaler.apply(activation, aux_loss)


class MiniCPMExperts(SequentialMLP):
    """The experts of one rank: one grouped matrix product for all where torch has a kernel, else one by one."""

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Tokens sorted by expert -> their outputs, times their weights.

        Args:
            permuted_local_hidden_states: [tokens, hidden_size].
            tokens_per_expert: int64 [local experts].
            permuted_probs: fp32 [tokens].

        Returns:
            [tokens, hidden_size], the sum over tensor-parallel ranks still to be made; and no bias.
        """
        if self._has_kernel(permuted_local_hidden_states):
            return self.grouped(permuted_local_hidden_states, tokens_per_expert, permuted_probs), None
        output, _ = super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        return output, None

    def _has_kernel(self, tokens: Tensor) -> bool:
        """Whether torch has a kernel for grouped products of these tokens: bf16 on CUDA, from torch 2.10."""
        # ZeRO 3, and Megatron-LM with --overlap-param-gather, bring weights to a rank when their own module is called
        first = self.local_experts[0].linear_fc1
        divided = hasattr(first.weight, "ds_id") or bool(first._forward_pre_hooks)
        fits = tokens.is_cuda and tokens.dtype == torch.bfloat16 and hasattr(F, "grouped_mm")
        return self.num_local_experts > 1 and fits and not divided

    def grouped(self, tokens: Tensor, tokens_per_expert: Tensor, weights: Tensor) -> Tensor:
        """What `forward` computes, by torch's grouped matrix product; the same on every device."""
        # Megatron-Core has brought the counts to the host; a copy back that blocks would wait for all queued kernels
        ends = tokens_per_expert.cumsum(0).to(device=tokens.device, dtype=torch.int32, non_blocking=True)
        first, second = (
            [getattr(expert, name).weight for expert in self.local_experts] for name in ("linear_fc1", "linear_fc2")
        )
        gate, up = _GroupedLinear.apply(tokens, ends, *first).chunk(2, dim=-1)
        inner = (F.silu(gate) * up * weights.unsqueeze(-1)).to(tokens.dtype)
        return _GroupedLinear.apply(inner, ends, *second)


class _GroupedLinear(torch.autograd.Function):
    """Consecutive rows of the tokens times the transpose of a weight each.

    Autograd of the product itself would keep the weights side by side until backward: a second copy of the experts of
    all layers.
    """

    @staticmethod
    def forward(context: Any, tokens: Tensor, ends: Tensor, *weights: Tensor) -> Tensor:
        """Tokens [tokens, in], ends int32 [experts] of each expert's rows, weights [out, in] -> [tokens, out]."""
        context.save_for_backward(tokens, ends, *weights)
        return F.grouped_mm(tokens, side_by_side(weights).transpose(1, 2), offs=ends)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> Any:
        tokens, ends, *weights = context.saved_tensors
        gradient = gradients[0].contiguous()
        for_tokens = F.grouped_mm(gradient, side_by_side(weights), offs=ends)
        for_weights = F.grouped_mm(gradient.T, tokens, offs=ends)
        return for_tokens, None, *for_weights.unbind()


def side_by_side(weights: Sequence[Tensor]) -> Tensor:
    """[experts, out, in] of matrices [out, in]: a view where they lie at equal distances in one buffer, as ZeRO 1 and 2
    lay them, else a copy."""
    first = weights[0]
    places = [weight.storage_offset() for weight in weights]
    distance = places[1] - places[0]
    one_buffer = all(weight.untyped_storage().data_ptr() == first.untyped_storage().data_ptr() for weight in weights)
    evenly = all(place == places[0] + number * distance for number, place in enumerate(places))
    if one_buffer and evenly and distance > 0 and all(weight.is_contiguous() for weight in weights):
        return first.detach().as_strided((len(weights), *first.shape), (distance, first.size(1), 1))
    return torch.stack([weight.detach() for weight in weights])


def set_auxiliary_loss_scale(scale: float, device: torch.device) -> None:
    """Factor by which backward multiplies the gradients of all load-balancing and z-losses."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(scale, device=device))


def get_experts_spec(backend: BackendSpecProvider) -> ModuleSpec:
    """The spec of a layer's mixture of experts, in the place of its MLP."""
    linears = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    return ModuleSpec(
        module=MoELayer,
        submodules=MoESubmodules(experts=ModuleSpec(module=MiniCPMExperts, submodules=linears), router=MiniCPMRouter),
    )
