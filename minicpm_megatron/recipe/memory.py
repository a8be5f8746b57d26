"""How much memory a rank needs, estimated from the recipe alone.

An estimate to choose a layout by, not a measurement: formulas count the tensors that must exist at once, so the
allocator's slack, kernels' workspaces and what the framework itself occupies come on top.
Activations follow Korthikanti et al. 2022 (arXiv 2205.05198), redone for this block: RMSNorm, SwiGLU, grouped heads,
no dropout, and an attention that never stores its S x S scores. State follows ZeRO (Rajbhandari et al. 2020, arXiv
1910.02054) as DeepSpeed 0.19 keeps it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from minicpm_megatron.recipe.checks import Layout
from minicpm_megatron.recipe.parameters import attention_parameters, count_parameters, mlp_parameters
from minicpm_megatron.recipe.schema import ModelRecipe, Recipe

FP32 = 4
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
# elements; defaults of DeepSpeed's zero_optimization, which the engine leaves alone
REDUCE_BUCKET_SIZE = 500_000_000
STAGE3_MAX_LIVE_PARAMETERS = 1_000_000_000


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank.

    Attributes:
        weights: parameters in the precision of forward and backward.
        gradients: in the same precision; in bf16 with ZeRO also their fp32 sum.
        optimizer: Adam's two moments and the fp32 master weights.
        activations: kept from forward to backward for every micro-batch in flight.
        logits: those of one micro-batch, their fp32 copy and its gradient.
        buffers: what communication holds beside all that.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int

    @property
    def total(self) -> int:
        """All of them at once."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True)
class Stage:
    """One pipeline stage; without a pipeline the only one.

    Attributes:
        layers: transformer layers it holds.
        first: it holds the embedding.
        last: it holds the final norm and the LM head.
        in_flight: micro-batches whose activations it keeps at once under 1F1B (Narayanan et al. 2021, arXiv
            2104.04473): stage i of p keeps p - i, if there are as many.
    """

    layers: int
    first: bool
    last: bool
    in_flight: int


def pipeline_stages(recipe: Recipe, layout: Layout) -> list[Stage]:
    """The stages in order. Without parallel.pipeline_layers each is taken to have the layers of the fullest."""
    count = layout.pipeline_model_parallel_size
    layers = recipe.parallel.pipeline_layers or (-(-recipe.model.num_layers // count),) * count
    micro_batches = max(layout.gradient_accumulation_steps)
    return [
        Stage(layers[index], first=index == 0, last=index == count - 1, in_flight=min(count - index, micro_batches))
        for index in range(count)
    ]


def estimate_memory(recipe: Recipe, layout: Layout) -> MemoryEstimate:
    """Bytes on the fullest rank of `layout`.

    With P parameters on the rank, e bytes an element and D data-parallel ranks:
    weights e P (ZeRO 3: / D); gradients e P (ZeRO 2: / D) and in bf16 their fp32 sum, 4 P with ZeRO 1, whose sum
    DeepSpeed keeps whole, and 4 P / D above; optimizer 12 P / D with ZeRO 1 or more, because DeepSpeed keeps fp32
    master weights beside the moments even in fp32; without ZeRO 12 P in bf16 and 8 P in fp32.
    """
    return max((_on_stage(recipe, layout, stage) for stage in pipeline_stages(recipe, layout)), key=lambda e: e.total)


def _on_stage(recipe: Recipe, layout: Layout, stage: Stage) -> MemoryEstimate:
    element = ELEMENT_BYTES[recipe.training.precision]
    zero, half = recipe.deepspeed.zero_stage, recipe.training.precision != "fp32"
    weights = gradients = optimizer = 0.0
    parameters = parameters_on_rank(recipe.model, layout, stage)
    for count, replicas in parameters:
        weights += element * count / (replicas if zero >= 3 else 1)
        gradients += element * count / (replicas if zero >= 2 else 1)
        if zero >= 1 and half:
            gradients += FP32 * count / (replicas if zero >= 2 else 1)
        optimizer += (12 if half or zero >= 1 else 8) * count / (replicas if zero >= 1 else 1)
    activations, logits = _activations(recipe, layout, stage), logits_bytes(recipe, layout) if stage.last else 0.0
    during, after = _buffers(recipe, layout, stage, sum(count for count, _ in parameters))
    return MemoryEstimate(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=round(activations),
        logits=round(logits),
        buffers=round(during + max(0.0, after - activations - logits)),
    )


def parameters_on_rank(model: ModelRecipe, layout: Layout, stage: Stage) -> list[tuple[float, int]]:
    """(parameters, ranks that hold the same) for dense and for expert parameters.

    Matrices are divided by tensor parallelism, norms and routers are not. Where the embedding is the head, the first
    and the last stage each hold it.
    """
    tp, dp = layout.tensor_model_parallel_size, layout.data_parallel_size * layout.context_parallel_size
    own_head = stage.last and (model.untie_embeddings_and_output_weights or not stage.first)
    vocabulary = count_parameters(model).embedding * (stage.first + own_head)
    replicated = stage.layers * 2 * model.hidden_size + (model.hidden_size if stage.last else 0)
    dense = (vocabulary + stage.layers * attention_parameters(model)) / tp
    if model.num_moe_experts is None:
        return [(dense + stage.layers * mlp_parameters(model) / tp + replicated, dp)]
    replicated += stage.layers * model.num_moe_experts * model.hidden_size
    experts = stage.layers * model.num_moe_experts * mlp_parameters(model) / tp / layout.expert_model_parallel_size
    return [(dense + replicated, dp), (experts, max(1, dp // layout.expert_model_parallel_size))]


def tokens_on_rank(recipe: Recipe, layout: Layout) -> float:
    """Tokens of one micro-batch that pass through one rank: micro-batch size x sequence length / context parallel."""
    return recipe.training.micro_batch_size * recipe.data.sequence_length / layout.context_parallel_size


def layer_elements(recipe: Recipe, layout: Layout) -> float:
    """Elements that one layer keeps for each token on the rank, without recompute.

    4 H (inputs and outputs of both norms; divided only with sequence parallelism), and divided by tensor parallelism:
    queries, keys and values, the two of them that rotation copies, the attention's output, and 4 F (gate, up,
    silu(gate), their product) for each expert that serves the token. In a mixture of experts also each expert's input
    and output.
    """
    model, tp = recipe.model, layout.tensor_model_parallel_size
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    experts = 1 if model.num_moe_experts is None else model.moe_router_topk
    inner = (queries + 2 * keys) + (queries + keys) + queries + 4 * model.ffn_hidden_size * experts
    dispatched = 0 if model.num_moe_experts is None else 2 * experts * model.hidden_size
    return 4 * model.hidden_size / _outer(recipe, layout) + inner / tp + dispatched


def _outer(recipe: Recipe, layout: Layout) -> int:
    """Ranks that divide what lies between the tensor-parallel regions."""
    return layout.tensor_model_parallel_size if recipe.parallel.sequence_parallel else 1


def _activations(recipe: Recipe, layout: Layout, stage: Stage) -> float:
    """Of all micro-batches in flight on one rank.

    Full recompute keeps a layer's input only, and one layer whole. Selective recompute repeats the attention core,
    whose kept inputs and output are needed anyway: with an attention that stores no scores it saves nothing, and none
    is subtracted.
    """
    layer = layer_elements(recipe, layout)
    kept = stage.layers * layer
    if recipe.training.recompute == "full":
        kept = stage.layers * recipe.model.hidden_size / _outer(recipe, layout) + layer
    element = ELEMENT_BYTES[recipe.training.precision]
    return tokens_on_rank(recipe, layout) * element * kept * stage.in_flight


def logits_bytes(recipe: Recipe, layout: Layout) -> float:
    """V / tp logits a token in the run's precision, as fp32 for the loss, and their fp32 gradient."""
    rows = -(-recipe.model.vocab_size // layout.tensor_model_parallel_size)
    element = ELEMENT_BYTES[recipe.training.precision]
    copies = FP32 + FP32 + (element if element != FP32 else 0)
    return tokens_on_rank(recipe, layout) * rows * copies


def _buffers(recipe: Recipe, layout: Layout, stage: Stage, parameters: float) -> tuple[float, float]:
    """(bytes beside the activations, bytes once they are gone), as DeepSpeed 0.19 and Megatron-Core allocate them.

    During backward: with sequence parallelism one gathered input, H a token (of each expert in a mixture); in a
    ring of context parallelism two blocks of keys and values; at a pipeline stage's border one hidden state each way;
    ZeRO 1 in fp32 and ZeRO 3 one reduce bucket, ZeRO 2 two; ZeRO 3 also the gathered parameters.
    After backward: the flat copy that is reduced, one bucket without ZeRO; bf16 at ZeRO 1 joins all gradients, in fp32
    and in bf16.
    """
    model, element = recipe.model, ELEMENT_BYTES[recipe.training.precision]
    zero, half = recipe.deepspeed.zero_stage, recipe.training.precision != "fp32"
    elements = 0.0
    if _outer(recipe, layout) > 1:
        elements += model.hidden_size * (1 if model.num_moe_experts is None else model.moe_router_topk)
    if layout.context_parallel_size > 1:
        elements += 2 * 2 * model.num_query_groups * model.kv_channels / layout.tensor_model_parallel_size
    if not (stage.first and stage.last):
        elements += 2 * model.hidden_size / _outer(recipe, layout)
    during = elements * tokens_on_rank(recipe, layout) * element
    if zero == 0:
        return during, element * min(REDUCE_BUCKET_SIZE, parameters)
    if zero == 1 and half:
        return during, (FP32 + element) * parameters
    during += element * REDUCE_BUCKET_SIZE * (2 if zero == 2 else 1)
    if zero == 3:
        during += element * min(STAGE3_MAX_LIVE_PARAMETERS, parameters)
    return during, 0.0
