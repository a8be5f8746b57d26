"""Initial weights that do not depend on the layout.

Every tensor is drawn whole, in fp32 on the CPU, from a generator seeded by (seed, its name), and each rank keeps its
shard. So weights are bit-identical for every tensor- and pipeline-parallel size, every ZeRO stage and every device.
"""

from __future__ import annotations

import torch

from minicpm_megatron.errors import require
from minicpm_megatron.methods import draws
from minicpm_megatron.methods.mup import mup_table, role_of
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.sharding import mark_tensor_parallel, named_shards


def initial_tensor(name: str, shape: tuple[int, ...], std: float | None, seed: int) -> torch.Tensor:
    """The whole initial tensor `name`: fp32 normal with deviation `std`, or ones where std is None."""
    return torch.ones(shape) if std is None else draws.normal(name, shape, std, seed)


def _check_arguments(model: torch.nn.Module, config: MiniCPMConfig) -> None:
    """Compare what Megatron-Core's models keep of their arguments; MiniCPM's own models and pipelines always agree."""
    tied = not config.untie_embeddings_and_output_weights
    for name, expected in (("share_embeddings_and_output_weights", tied), ("position_embedding_type", "rope")):
        found = getattr(model, name, expected)
        require(found == expected, type(model).__name__, f"{name} is {found!r}", f"give {name}={expected!r}")
    rows = getattr(model, "vocab_size", config.vocab_size)
    require(
        rows >= config.vocab_size,
        type(model).__name__,
        f"vocab_size is {rows:,}, the config's is {config.vocab_size:,}",
        "give vocab_size=config.padded_vocab_size()",
    )


@torch.no_grad()
def initialize_parameters(model: torch.nn.Module, config: MiniCPMConfig, seed: int) -> None:
    """Set every parameter of this rank as the muP table says (Table 7 of arXiv 2404.06395).

    Args:
        model: a MiniCPMModel, or a GPTModel built from `get_minicpm_block_spec`.
        config: the one that the model was built from.
        seed: decides all weights; vocabulary padding is zero.

    Raises:
        UserError: a GPTModel or HybridModel was given other arguments than the config says.
    """
    _check_arguments(model, config)
    table = mup_table(config)
    for name, parameter, spec in named_shards(model, config):
        whole = initial_tensor(name, spec.global_shape, table[role_of(name, len(spec.global_shape))].init_std, seed)
        parameter.copy_(spec.take(whole, tuple(parameter.shape)))
    mark_tensor_parallel(model)
