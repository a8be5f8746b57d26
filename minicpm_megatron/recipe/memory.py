"""How much memory a rank needs, estimated from the recipe alone.

An estimate to choose a layout by, not a measurement: formulas count the tensors that must exist at once, so the
allocator's slack, communication buffers, kernels' workspaces and what the framework itself occupies come on top.
Activations follow Korthikanti et al. 2022 (arXiv 2205.05198), redone for this block: RMSNorm, SwiGLU, grouped heads,
no dropout, and an attention that never stores its S x S scores.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from minicpm_megatron.recipe.checks import Layout
from minicpm_megatron.recipe.parameters import attention_parameters, count_parameters, mlp_parameters
from minicpm_megatron.recipe.schema import ModelRecipe, Recipe

FP32 = 4
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank.

    Attributes:
        weights: parameters in the precision of forward and backward.
        gradients: in the same precision; in bf16 with ZeRO also the fp32 copy of the rank's own part.
        optimizer: Adam's two moments and the fp32 master weights.
        activations: kept from forward to backward for one micro-batch.
        logits: those of one micro-batch, their fp32 copy and its gradient.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of them at once."""
        return sum(getattr(self, part.name) for part in fields(self))


def estimate_memory(recipe: Recipe, layout: Layout) -> MemoryEstimate:
    """Bytes on the fullest rank of `layout`.

    With P parameters on the rank, e bytes an element and D data-parallel ranks:
    weights e P (ZeRO 3: / D), gradients e P (ZeRO 2: / D), optimizer 12 P / D with ZeRO 1 or more, because DeepSpeed
    keeps fp32 master weights beside the moments even in fp32; without ZeRO 12 P in bf16 and 8 P in fp32.
    """
    element = ELEMENT_BYTES[recipe.training.precision]
    stage, half = recipe.deepspeed.zero_stage, recipe.training.precision != "fp32"
    weights = gradients = optimizer = 0.0
    for count, replicas in _parameters_on_rank(recipe.model, layout):
        weights += element * count / (replicas if stage >= 3 else 1)
        gradients += element * count / (replicas if stage >= 2 else 1)
        if stage >= 1:
            gradients += FP32 * count / replicas if half else 0
        optimizer += (12 if half or stage >= 1 else 8) * count / (replicas if stage >= 1 else 1)
    return MemoryEstimate(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=round(_activations(recipe, layout, element)),
        logits=round(_logits(recipe, layout, element)),
    )


def _parameters_on_rank(model: ModelRecipe, layout: Layout) -> list[tuple[float, int]]:
    """(parameters, ranks that hold the same) for dense and for expert parameters.

    Matrices are divided by tensor parallelism, norms and routers are not; of a pipeline the first stage is taken,
    which holds the embedding, with the head where both are in one stage.
    """
    tp, dp = layout.tensor_model_parallel_size, layout.data_parallel_size * layout.context_parallel_size
    layers = -(-model.num_layers // layout.pipeline_model_parallel_size)
    counts = count_parameters(model)
    vocabulary = counts.embedding + (counts.head if layout.pipeline_model_parallel_size == 1 else 0)
    replicated = layers * 2 * model.hidden_size + model.hidden_size
    dense = (vocabulary + layers * attention_parameters(model)) / tp
    if model.num_moe_experts is None:
        return [(dense + layers * mlp_parameters(model) / tp + replicated, dp)]
    replicated += layers * model.num_moe_experts * model.hidden_size
    experts = layers * model.num_moe_experts * mlp_parameters(model) / tp / layout.expert_model_parallel_size
    return [(dense + replicated, dp), (experts, max(1, dp // layout.expert_model_parallel_size))]


def _tokens(recipe: Recipe, layout: Layout) -> float:
    return recipe.training.micro_batch_size * recipe.data.sequence_length / layout.context_parallel_size


def _activations(recipe: Recipe, layout: Layout, element: int) -> float:
    """One micro-batch on one rank; a pipeline's first stage keeps one for each stage.

    A layer keeps, for each token, 4 H (inputs and outputs of both norms; divided only with sequence parallelism), and
    divided by tensor parallelism: queries, keys and values, the two of them that rotation copies, the attention's
    output, and 4 F (gate, up, silu(gate), their product) for each expert that serves the token. Full recompute keeps
    a layer's input only, and one layer whole. Selective recompute repeats the attention core, whose kept inputs and
    output are needed anyway: with an attention that stores no scores it saves nothing, and none is subtracted.
    """
    model, tp = recipe.model, layout.tensor_model_parallel_size
    outer = tp if recipe.parallel.sequence_parallel else 1
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    experts = 1 if model.num_moe_experts is None else model.moe_router_topk
    inner = (queries + 2 * keys) + (queries + keys) + queries + 4 * model.ffn_hidden_size * experts
    layer = 4 * model.hidden_size / outer + inner / tp
    layers = -(-model.num_layers // layout.pipeline_model_parallel_size)
    kept = layers * layer
    if recipe.training.recompute == "full":
        kept = layers * model.hidden_size / outer + layer
    in_flight = layout.pipeline_model_parallel_size
    return _tokens(recipe, layout) * element * kept * in_flight


def _logits(recipe: Recipe, layout: Layout, element: int) -> float:
    """V / tp logits a token in the run's precision, as fp32 for the loss, and their fp32 gradient."""
    rows = -(-recipe.model.vocab_size // layout.tensor_model_parallel_size)
    copies = FP32 + FP32 + (element if element != FP32 else 0)
    return _tokens(recipe, layout) * rows * copies
