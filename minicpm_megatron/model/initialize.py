"""Initial weights that do not depend on the layout.

Every tensor is drawn whole, in fp32 on the CPU, from a generator seeded by (seed, its name), and each rank keeps its
shard. So weights are bit-identical for every tensor- and pipeline-parallel size, every ZeRO stage and every device.
"""

from __future__ import annotations

import torch

from minicpm_megatron.methods import draws
from minicpm_megatron.methods.mup import mup_table, role_of
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.sharding import mark_tensor_parallel, named_shards


def initial_tensor(name: str, shape: tuple[int, ...], std: float | None, seed: int) -> torch.Tensor:
    """The whole initial tensor `name`: fp32 normal with deviation `std`, or ones where std is None."""
    return torch.ones(shape) if std is None else draws.normal(name, shape, std, seed)


@torch.no_grad()
def initialize_parameters(model: torch.nn.Module, config: MiniCPMConfig, seed: int) -> None:
    """Set every parameter of this rank as the muP table says (Table 7 of arXiv 2404.06395).

    Args:
        model: a MiniCPMModel, or a GPTModel built from `get_minicpm_block_spec`.
        seed: decides all weights; vocabulary padding is zero.
    """
    table = mup_table(config)
    for name, parameter, spec in named_shards(model, config):
        whole = initial_tensor(name, spec.global_shape, table[role_of(name, len(spec.global_shape))].init_std, seed)
        parameter.copy_(spec.take(whole, tuple(parameter.shape)))
    mark_tensor_parallel(model)
