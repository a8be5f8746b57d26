"""Which part of which global tensor each parameter of a rank is.

Global tensors carry Megatron-Core's names and have their whole, unpadded shape; this table is all that initial
weights, checkpoints and conversions need to know about tensor parallelism.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from torch.nn import Parameter

from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.hybrid_names import gpt_name
from minicpm_megatron.storage.sharded import ShardSpec


@dataclass(frozen=True)
class Split:
    """How one kind of tensor divides over tensor-parallel ranks: along `dim`, in `parts` equal parts each of which is
    divided by itself (SwiGLU's gate and up are two)."""

    dim: int
    parts: int = 1


# the end of a parameter's name -> its split; what is not listed is the same on every rank
SPLITS = {
    "embedding.word_embeddings.weight": Split(0),
    "output_layer.weight": Split(0),
    "self_attention.linear_qkv.weight": Split(0),
    "self_attention.linear_proj.weight": Split(1),
    "linear_fc1.weight": Split(0, parts=2),
    "linear_fc2.weight": Split(1),
}
LAYERS = "decoder.layers."
EXPERTS = ".experts.local_experts."
VOCABULARY = ("embedding.word_embeddings.weight", "output_layer.weight")


def global_shape(config: MiniCPMConfig, name: str) -> tuple[int, ...]:
    """Whole shape of the tensor `name` without padding."""
    hidden, feed_forward = config.hidden_size, config.ffn_hidden_size
    if EXPERTS in name:
        feed_forward = config.moe_ffn_hidden_size
    queries = config.num_attention_heads * config.kv_channels
    keys = config.num_query_groups * config.kv_channels
    shapes = {
        "embedding.word_embeddings.weight": (config.vocab_size, hidden),
        "output_layer.weight": (config.vocab_size, hidden),
        "self_attention.linear_qkv.weight": (queries + 2 * keys, hidden),
        "self_attention.linear_proj.weight": (hidden, queries),
        "linear_fc1.weight": (2 * feed_forward, hidden),
        "linear_fc2.weight": (hidden, feed_forward),
        "router.weight": (config.num_moe_experts or 0, hidden),
        "self_attention.q_layernorm.weight": (config.kv_channels,),
        "self_attention.k_layernorm.weight": (config.kv_channels,),
        "layernorm.weight": (hidden,),
    }
    for ending, shape in shapes.items():
        if name.endswith(ending):
            return shape
    raise KeyError(f"{name} is not a tensor of MiniCPM")


def shard_spec(config: MiniCPMConfig, name: str, rank: int | None = None) -> ShardSpec:
    """The shard of tensor `name` that tensor-parallel rank `rank` (default: this one) holds."""
    ranks = config.tensor_model_parallel_size
    rank = parallel_state.get_tensor_model_parallel_rank() if rank is None else rank
    shape = global_shape(config, name)
    split = next((split for ending, split in SPLITS.items() if name.endswith(ending)), None)
    if split is None or ranks == 1 and name not in VOCABULARY:
        return ShardSpec(name=name, global_shape=shape, dim=None, ranges=())
    if name in VOCABULARY:
        rows = config.padded_vocab_size() // ranks
        start = min(rank * rows, config.vocab_size)
        length = min(rows, config.vocab_size - start)
        return ShardSpec(name=name, global_shape=shape, dim=0, ranges=((start, length),))
    part = shape[split.dim] // split.parts
    length = part // ranks
    ranges = tuple((index * part + rank * length, length) for index in range(split.parts))
    return ShardSpec(name=name, global_shape=shape, dim=split.dim, ranges=ranges)


def global_name(model: torch.nn.Module, config: MiniCPMConfig, name: str) -> str:
    """The name that a parameter of this rank has in the whole model.

    Layers and experts are numbered from the model's first, and the copy of a tied embedding that the last stage keeps
    for the LM head is the embedding. A module of `model.pipeline` knows itself what it is of the whole.
    """
    before, experts, after = _without_stage(model, config, name).partition(EXPERTS)
    if not experts:
        return before
    local, rest = after.split(".", 1)
    each = (config.num_moe_experts or 0) // config.expert_model_parallel_size
    number = parallel_state.get_expert_model_parallel_rank() * each + int(local)
    return f"{before}{EXPERTS}{number}.{rest}"


def _without_stage(model: torch.nn.Module, config: MiniCPMConfig, name: str) -> str:
    """The name in a model of one pipeline stage, experts numbered from this rank's first."""
    parts = name.split(".")
    for cut in range(1, len(parts)):
        prefix: Any = getattr(model.get_submodule(".".join(parts[:cut])), "global_prefix", None)
        if prefix is not None:
            here, whole = prefix
            return str(whole) + ".".join(parts[cut:]).removeprefix(here)
    if name == "output_layer.weight" and not config.untie_embeddings_and_output_weights:
        return "embedding.word_embeddings.weight"
    whole = name
    if name.startswith(LAYERS):
        local, rest = name.removeprefix(LAYERS).split(".", 1)
        layer: Any = model.get_submodule(f"{LAYERS}{local}")
        whole = f"{LAYERS}{layer.layer_number - 1}.{rest}"
    return gpt_name(whole) if isinstance(model, HybridModel) else whole


def named_shards(model: torch.nn.Module, config: MiniCPMConfig) -> Iterator[tuple[str, Parameter, ShardSpec]]:
    """Every parameter of this rank with its global name and shard."""
    for local, parameter in model.named_parameters():
        name = global_name(model, config, local)
        yield name, parameter, shard_spec(config, name)


def mark_tensor_parallel(model: torch.nn.Module) -> None:
    """Set the attributes by which Megatron-Core and DeepSpeed tell split parameters from replicated ones.

    Megatron-Core sets them while it initialises weights, which is left to `initialize_parameters`.
    """
    for name, parameter in model.named_parameters():
        split = next((split for ending, split in SPLITS.items() if name.endswith(ending)), None)
        if not hasattr(parameter, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(
                parameter, split is not None, split.dim if split else -1, split.parts if split else 1
            )
