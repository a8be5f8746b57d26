"""How evenly the experts of a mixture are used, layer by layer, over all ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist

from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.experts import MiniCPMRouter
from minicpm_megatron.parallel import device


@dataclass(frozen=True)
class LayerLoad:
    """What one layer's router did since it was last asked.

    Attributes:
        layer: number of the layer, from 1.
        share: of the (token, expert) pairs that each expert served; they add up to 1.
        evenness: entropy of `share` over log(experts): 1 when all are used alike, 0 when one serves everything.
        router_entropy: mean entropy in nats of a token's softmax over all experts.
        dropped: share of the pairs that no expert served.
        load_balancing_loss: mean of the auxiliary loss without its coefficient; 1 when all are used alike.
    """

    layer: int
    share: tuple[float, ...]
    evenness: float
    router_entropy: float
    dropped: float
    load_balancing_loss: float


def take_loads(model: torch.nn.Module, config: MiniCPMConfig) -> list[LayerLoad]:
    """The load of every layer over all ranks since the last call; all ranks of the job must call it together."""
    experts = config.num_moe_experts
    if experts is None:
        return []
    table = torch.zeros(config.num_layers, experts + 4, dtype=torch.float64, device=device.device())
    for module in model.modules():
        if isinstance(module, MiniCPMRouter):
            load = module.take_load()
            rest = torch.tensor([float(x) for x in (load.routed, load.entropy, load.auxiliary, load.calls)])
            table[module.layer_number - 1] = torch.cat([load.tokens, rest.to(load.tokens)])
    dist.all_reduce(table)
    parts = config.tensor_model_parallel_size * config.context_parallel_size
    return [
        _layer(number, values, config.moe_router_topk, parts)
        for number, values in enumerate(table.tolist(), 1)
        if values[-1]
    ]


def _layer(number: int, values: list[float], topk: int, parts: int) -> LayerLoad:
    *tokens, routed, entropy, auxiliary, calls = values
    served = sum(tokens)
    share = [count / served for count in tokens]
    return LayerLoad(
        layer=number,
        share=tuple(share),
        evenness=-sum(part * math.log(part) for part in share if part) / math.log(len(share)),
        router_entropy=entropy / routed,
        dropped=1 - served / (topk * routed),
        # tensor- and context-parallel ranks each hold a part of a micro-batch's loss
        load_balancing_loss=auxiliary * parts / calls,
    )
