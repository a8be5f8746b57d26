"""FLOPs of a model. Imports no torch, so that a plan needs none."""

from __future__ import annotations

from minicpm_megatron.recipe.batches import BatchPlan
from minicpm_megatron.recipe.parameters import count_parameters
from minicpm_megatron.recipe.schema import ModelRecipe, Recipe


def flops_per_token(model: ModelRecipe, sequence_length: int) -> float:
    """FLOPs of forward and backward for one token, in the convention of PaLM's appendix B.

    6 for every weight that multiplies the token (the LM head too, the embedding lookup not), plus attention.
    Recomputed activations do not count: they are not model FLOPs.
    """
    layers = 6.0 * count_parameters(model).active_non_embedding
    return layers + head_flops_per_token(model) + attention_flops_per_token(model, sequence_length)


def head_flops_per_token(model: ModelRecipe) -> float:
    """The LM head's part of `flops_per_token`: 6 H V."""
    return 6.0 * model.hidden_size * model.vocab_size


def attention_flops_per_token(model: ModelRecipe, sequence_length: int) -> float:
    """The attention core's part: 12 x layers x heads x d_head x sequence_length, as if it were not causal."""
    return 12.0 * model.num_layers * model.num_attention_heads * model.kv_channels * sequence_length


def run_flops(recipe: Recipe, first: int, last: int) -> float:
    """FLOPs of the steps after `first` up to `last` of a run, each at the length of its rows."""
    plan, model = BatchPlan(recipe), recipe.model
    if not plan.curriculum:
        return (plan.tokens(last) - plan.tokens(first)) * flops_per_token(model, plan.sequence_length)
    return sum(
        (plan.tokens(step + 1) - plan.tokens(step)) * flops_per_token(model, plan.row_length(step))
        for step in range(first, last)
    )
