"""How many parameters a model has, in closed form, without building it."""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_megatron.recipe.schema import ModelRecipe

CHECKPOINT_BYTES = 12
"""Bytes a parameter in a checkpoint of a run: the fp32 weight and Adam's two moments."""


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by where they are; vocabulary unpadded.

    Attributes:
        embedding: the input embedding V x H.
        head: the LM head V x H, 0 where it is the input embedding.
        non_embedding: all others, norms included: the N of Table 2 and Table 8.
        active_non_embedding: those of them that serve one token; all in a dense model.
        total: embedding + head + non_embedding.
    """

    embedding: int
    head: int
    non_embedding: int
    active_non_embedding: int
    total: int


def attention_parameters(model: ModelRecipe) -> int:
    """Fused query/key/value and output projections of one layer."""
    queries = model.num_attention_heads * model.kv_channels
    keys_and_values = 2 * model.num_query_groups * model.kv_channels
    return model.hidden_size * (queries + keys_and_values) + queries * model.hidden_size


def mlp_parameters(model: ModelRecipe) -> int:
    """Gate, up and down projections of one layer, of one expert where there are several."""
    return 3 * model.hidden_size * model.mlp_width


def norm_parameters(model: ModelRecipe) -> int:
    """The norms of one layer: before attention and MLP, and with qk_layernorm of a head's queries and keys."""
    return 2 * model.hidden_size + (2 * model.kv_channels if model.qk_layernorm else 0)


def count_parameters(model: ModelRecipe) -> ParameterCounts:
    """Exact counts; 2.4B: 40 x (4 x 2304^2 + 3 x 2304 x 5760 + 2 x 2304) + 2304 = 2,442,057,984 (Table 2)."""
    norms = norm_parameters(model)
    experts, active, router = 1, 1, 0
    if model.num_moe_experts is not None:
        experts, active = model.num_moe_experts, model.moe_router_topk
        router = experts * model.hidden_size
    shared = attention_parameters(model) + norms + router
    mlp = mlp_parameters(model)
    non_embedding = model.num_layers * (shared + experts * mlp) + model.hidden_size
    embedding = model.vocab_size * model.hidden_size
    head = embedding if model.untie_embeddings_and_output_weights else 0
    return ParameterCounts(
        embedding=embedding,
        head=head,
        non_embedding=non_embedding,
        active_non_embedding=model.num_layers * (shared + active * mlp) + model.hidden_size,
        total=embedding + head + non_embedding,
    )
