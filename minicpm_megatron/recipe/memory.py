"""How much memory a rank needs, estimated from the recipe alone.

Formulas count the tensors that must exist at once, so the allocator's slack, kernels' workspaces and what the framework
itself occupies come on top. `benchmarks/plan_check.py` measures the same tensors in real runs (docs/parallelism.md).
Activations follow Korthikanti et al. 2022 (arXiv 2205.05198), redone for this block: RMSNorm, SwiGLU, grouped heads,
no dropout, and an attention that never stores its S x S scores. State follows ZeRO (Rajbhandari et al. 2020, arXiv
1910.02054) as DeepSpeed 0.19 keeps it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

from minicpm_megatron.recipe.checks import Layout
from minicpm_megatron.recipe.deepspeed_json import zero_sizes
from minicpm_megatron.recipe.loss_chunks import loss_bytes
from minicpm_megatron.recipe.matrices import weights_of_roles
from minicpm_megatron.recipe.parameters import attention_parameters, count_parameters, mlp_parameters, norm_parameters
from minicpm_megatron.recipe.schema import ModelRecipe, Recipe
from minicpm_megatron.registry import OPTIMIZERS

FP32 = 4
ELEMENT_BYTES = {"fp32": 4, "bf16": 2}
VOCABULARY_MULTIPLE = 128  # rows; Megatron-Core's default of make_vocab_size_divisible_by, for each rank
REDUCE_BUCKET_SIZE = 500_000_000  # elements; DeepSpeed's default of zero_optimization.reduce_bucket_size
ALLREDUCE_BUCKET_SIZE = 500_000_000  # elements; DeepSpeed's MEMORY_OPT_ALLREDUCE_SIZE, which no setting changes


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank.

    Attributes:
        weights: parameters in the precision of forward and backward.
        gradients: what is kept of them from one micro-batch to the next, and what logging.gradient_statistics keeps
            of gradients and weights from one step to the next.
        optimizer: its moments and the fp32 master weights.
        activations: kept from forward to backward for every micro-batch in flight.
        working: the more of what the loss holds (a chunk of logits, or all; the head's gradient) and what the backward
            pass of one layer holds (its recomputed activations, their gradients).
        buffers: what communication holds beside all that.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    working: int
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


def estimate_memory(recipe: Recipe, layout: Layout, *, fused_norm: bool = True) -> MemoryEstimate:
    """Bytes on the fullest rank of `layout`; see `stage_memory`."""
    stages = pipeline_stages(recipe, layout)
    return max((stage_memory(recipe, layout, each, fused_norm=fused_norm) for each in stages), key=lambda e: e.total)


def stage_memory(recipe: Recipe, layout: Layout, stage: Stage, *, fused_norm: bool = True) -> MemoryEstimate:
    """Bytes on a rank of one stage, in a step of several micro-batches.

    With P parameters on the rank, e bytes an element and D data-parallel ranks:
    weights e P (ZeRO 3: / D); gradients e P, ZeRO 2 and 3 4 P / D, fp32 with ZeRO 2 twice that where micro-batches are
    added up, and bf16 with ZeRO 1 an fp32 sum of 4 P besides, which DeepSpeed keeps whole; optimizer, with m bytes of
    moments a parameter (AdamW 8): (4 + m) P / D with ZeRO 1 or more, because DeepSpeed keeps fp32 master weights beside
    the moments even in fp32; without ZeRO (4 + m) P in bf16 and m P in fp32. What is offloaded is `offloaded_bytes`.

    Args:
        fused_norm: RMSNorm is one kernel, which keeps its input and its output (CUDA). Torch composes it on CPU, where
            it keeps input and normalised input in fp32 and the output; chunks of the loss, too, are then CPU's.
    """
    element = ELEMENT_BYTES[recipe.training.precision]
    zero, half = recipe.deepspeed.zero_stage, recipe.training.precision != "fp32"
    spec = OPTIMIZERS.get(recipe.optimizer.name)
    # DeepSpeed reduces the next micro-batch's gradients into a tensor of their own and then adds it
    twice = zero == 2 and not half and max(layout.gradient_accumulation_steps) > 1
    weights = gradients = optimizer = 0.0
    parameters = parameters_on_rank(recipe.model, layout, stage)
    for count, replicas in parameters:
        weights += element * count / (replicas if zero >= 3 else 1)
        gradients += FP32 * count / replicas if zero >= 2 else (FP32 if zero == 0 else element) * count
        gradients += FP32 * count if zero == 1 and half else 0
        gradients += FP32 * count / replicas if twice else 0
        if recipe.deepspeed.offload_optimizer == "none":
            gradients += _statistics_bytes(recipe) * count / (replicas if zero >= 1 else 1)
    masters = FP32 if half or zero >= 1 else 0
    for role, count, replicas in parameters_by_role(recipe.model, layout, stage):
        optimizer += (masters + spec.state_bytes(role)) * count / (replicas if zero >= 1 else 1)
    if recipe.deepspeed.offload_optimizer != "none":
        optimizer = 0.0
    if recipe.deepspeed.offload_param != "none":
        weights = 0.0
    norm = _norm_bytes(recipe, layout, fused_norm)
    layer = _layer_bytes(recipe, layout, norm)
    activations = _activations(recipe, layout, stage, norm, layer)
    working = _working(recipe, layout, stage, norm, layer, on_cpu=not fused_norm)
    total = sum(count for count, _ in parameters)
    during, after = _buffers(recipe, layout, stage, total)
    fetch = during + _unpacked_bytes(recipe, layout, stage, total) - working
    matrices = weights_of_roles(recipe.model, 1, spec.whole_matrices)
    after = max(after, spec.matrix_copies * FP32 * max((weight.elements for weight in matrices), default=0))
    return MemoryEstimate(
        weights=round(weights),
        gradients=round(gradients),
        optimizer=round(optimizer),
        activations=round(activations),
        working=round(working),
        buffers=round(max(during, fetch, after - activations - working)),
    )


def offloaded_bytes(recipe: Recipe, layout: Layout) -> int:
    """Host memory that offload takes for each rank: masters, moments and their fp32 gradients, what
    logging.gradient_statistics keeps beside them, and weights."""
    spec, offloaded = OPTIMIZERS.get(recipe.optimizer.name), recipe.deepspeed.offload_optimizer != "none"
    weight = ELEMENT_BYTES[recipe.training.precision] if recipe.deepspeed.offload_param != "none" else 0

    def size(role: str) -> int:
        return weight + (2 * FP32 + spec.state_bytes(role) + _statistics_bytes(recipe) if offloaded else 0)

    stages = (parameters_by_role(recipe.model, layout, stage) for stage in pipeline_stages(recipe, layout))
    return round(max(sum(size(role) * count / replicas for role, count, replicas in stage) for stage in stages))


def _statistics_bytes(recipe: Recipe) -> int:
    """Bytes a parameter that logging.gradient_statistics keeps: a weight and a gradient, both fp32. Without ZeRO only
    the first of the ranks that hold the same keeps any."""
    return 0 if recipe.logging.gradient_statistics.interval is None else 2 * FP32


def parameters_on_rank(model: ModelRecipe, layout: Layout, stage: Stage) -> list[tuple[float, int]]:
    """(parameters, ranks that hold the same) for dense and for expert parameters."""
    roles = parameters_by_role(model, layout, stage)
    dense = [(count, replicas) for role, count, replicas in roles if role != "expert"]
    experts = [(count, replicas) for role, count, replicas in roles if role == "expert"]
    return [(sum(count for count, _ in dense), dense[0][1]), *experts]


def parameters_by_role(model: ModelRecipe, layout: Layout, stage: Stage) -> list[tuple[str, float, int]]:
    """(muP role, parameters on a rank, ranks that hold the same).

    Matrices are divided by tensor parallelism, norms and routers are not. Where the embedding is the head, the first
    and the last stage each hold it; an untied head counts as an embedding.
    """
    tp, dp = layout.tensor_model_parallel_size, layout.data_parallel_size * layout.context_parallel_size
    vocabulary = count_parameters(model).embedding * _vocabulary_matrices(model, stage)
    norms = stage.layers * norm_parameters(model) + (model.hidden_size if stage.last else 0)
    hidden = stage.layers * attention_parameters(model) / tp
    if model.num_moe_experts is None:
        hidden += stage.layers * mlp_parameters(model) / tp
        return [("embedding", vocabulary / tp, dp), ("hidden", hidden, dp), ("vector", norms, dp)]
    routers = stage.layers * model.num_moe_experts * model.hidden_size
    experts = stage.layers * model.num_moe_experts * mlp_parameters(model) / tp / layout.expert_model_parallel_size
    return [
        ("embedding", vocabulary / tp, dp),
        ("hidden", hidden, dp),
        ("vector", norms, dp),
        ("router", routers, dp),
        ("expert", experts, max(1, dp // layout.expert_model_parallel_size)),
    ]


def _vocabulary_matrices(model: ModelRecipe, stage: Stage) -> int:
    own_head = stage.last and (model.untie_embeddings_and_output_weights or not stage.first)
    return stage.first + own_head


def tokens_on_rank(recipe: Recipe, layout: Layout) -> float:
    """Tokens of one micro-batch that pass through one rank: micro-batch size x sequence length / context parallel."""
    return layout.micro_batch_size * recipe.data.sequence_length / layout.context_parallel_size


def layer_elements(recipe: Recipe, layout: Layout) -> float:
    """Elements that one layer keeps for each token on the rank, without recompute and with fused norms.

    4 H (inputs and outputs of both norms; divided only with sequence parallelism), and divided by tensor parallelism:
    queries, keys and values, the two of them that rotation copies (Ulysses: the copy of the output that is returned),
    the attention's output, and 5 F (gate, up, silu(gate), a copy of up, their product). In a mixture of experts 6 F
    (the product times the token's weight, too) for each expert that serves the token, and H that it is given.
    """
    return 4 * recipe.model.hidden_size / _outer(recipe, layout) + _inner_elements(recipe, layout)


def _inner_elements(recipe: Recipe, layout: Layout) -> float:
    model, tp = recipe.model, layout.tensor_model_parallel_size
    queries, keys = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    experts = model.moe_router_topk
    copied = queries + keys
    if layout.context_parallel_size > 1 and recipe.parallel.cp_comm_type == "a2a":
        # rotated tensors are sent away, and heads that several ranks need are received by each
        keys, copied = exchanged_groups(model, layout) * model.kv_channels, queries
    inner = (queries + 2 * keys) + copied + queries
    if model.num_moe_experts is None:
        return (inner + 5 * model.mlp_width) / tp
    return (inner + 6 * model.mlp_width * experts) / tp + experts * model.hidden_size


def exchanged_groups(model: ModelRecipe, layout: Layout) -> int:
    """Key/value heads over all ranks once Ulysses has repeated those that several ranks need."""
    ranks = layout.tensor_model_parallel_size * layout.context_parallel_size
    heads, per_group = model.num_attention_heads, model.num_attention_heads // model.num_query_groups
    return heads // math.gcd(heads // ranks, per_group)


def _outer(recipe: Recipe, layout: Layout) -> int:
    """Ranks that divide what lies between the tensor-parallel regions."""
    return layout.tensor_model_parallel_size if recipe.parallel.sequence_parallel else 1


def _norm_bytes(recipe: Recipe, layout: Layout, fused: bool) -> float:
    """Bytes a token that one norm keeps."""
    element = ELEMENT_BYTES[recipe.training.precision]
    return (2 * element if fused else 2 * FP32 + element) * recipe.model.hidden_size / _outer(recipe, layout)


def _layer_bytes(recipe: Recipe, layout: Layout, norm: float) -> float:
    """Bytes a token that one layer keeps without recompute."""
    return 2 * norm + ELEMENT_BYTES[recipe.training.precision] * _inner_elements(recipe, layout)


def _activations(recipe: Recipe, layout: Layout, stage: Stage, norm: float, layer: float) -> float:
    """Of all micro-batches in flight on one rank.

    Full recompute keeps a layer's input only. Selective recompute repeats the attention core, whose kept inputs and
    output are needed anyway: with an attention that stores no scores it saves nothing, and none is subtracted. A stage
    that is not the last keeps its output until the gradient arrives; the last also keeps what the final norm does.
    """
    hidden = ELEMENT_BYTES[recipe.training.precision] * recipe.model.hidden_size / _outer(recipe, layout)
    kept = stage.layers * (hidden if recipe.training.recompute == "full" else layer)
    kept += norm if stage.last else hidden
    return tokens_on_rank(recipe, layout) * kept * stage.in_flight


def _working(recipe: Recipe, layout: Layout, stage: Stage, norm: float, layer: float, *, on_cpu: bool = False) -> float:
    """The more of the loss and of one layer's backward, beside all activations.

    Fused loss: `loss_chunks.loss_bytes`, and the gradient of the head's input.
    Otherwise the loss: logits in the run's precision and in fp32, which becomes the softmax and then its gradient in
    place; fp32 needs no copy. Head: the gradients of logits, of its input and of its weight.
    Layer: gradients of the MLP's product, of its two factors and of the layer's output, less the product, which is no
    longer needed: 2 F + H a token; with full recompute the layer's activations; the final norm's are gone by then. The
    gradient of a tied embedding waits for the one of the input embedding.
    Without the fused loss DeepSpeed's pipeline has two buffers on the last stage, which hold the logits of two
    micro-batches until they are replaced by new ones.
    """
    model, element = recipe.model, ELEMENT_BYTES[recipe.training.precision]
    tp, tokens = layout.tensor_model_parallel_size, tokens_on_rank(recipe, layout)
    hidden = tokens * element * model.hidden_size / _outer(recipe, layout)
    head = count_parameters(model).embedding / tp * element
    backward = tokens * element * 2 * model.ffn_hidden_size / tp + hidden
    if recipe.training.recompute == "full":
        backward += tokens * layer - hidden
    if not stage.last:
        return backward
    if stage.first and not model.untie_embeddings_and_output_weights:
        backward += head
    entry = tokens * element * model.hidden_size  # sequence parallelism gathers and then scatters it
    if recipe.training.fused_loss:
        rows = vocabulary_rows(model, layout)
        loss = loss_bytes(math.ceil(tokens), rows, model.hidden_size, element, on_cpu=on_cpu) + entry
        return max(loss, backward - tokens * norm)
    logits = tokens * vocabulary_rows(model, layout) * element
    product, backward = logits + entry + head, backward - tokens * norm
    if stage.first:
        return max(logits_bytes(recipe, layout), product, backward)
    return max(3 * logits, logits + max(logits_bytes(recipe, layout), product), 2 * logits + backward)


def vocabulary_rows(model: ModelRecipe, layout: Layout) -> int:
    """Logits of a token on one rank."""
    return -(-model.vocab_size // layout.tensor_model_parallel_size)


def logits_bytes(recipe: Recipe, layout: Layout) -> float:
    """V / tp logits a token in fp32, and in bf16 where that is the run's precision."""
    element = ELEMENT_BYTES[recipe.training.precision]
    copies = FP32 + (element if element != FP32 else 0)
    return tokens_on_rank(recipe, layout) * vocabulary_rows(recipe.model, layout) * copies


def persistent_parameters(recipe: Recipe, layout: Layout, stage: Stage) -> float:
    """Of the parameters of a stage those too small for ZeRO 3 to divide for good: gathered once a step, then kept."""
    model, tp = recipe.model, layout.tensor_model_parallel_size
    heads, groups = model.num_attention_heads * model.kv_channels, model.num_query_groups * model.kv_channels
    experts = (model.num_moe_experts or 1) // layout.expert_model_parallel_size
    hidden, ffn = model.hidden_size, model.mlp_width
    layer = [(2, hidden), (1, hidden * (heads + 2 * groups) / tp), (1, hidden * heads / tp)]
    layer += [(experts, 2 * hidden * ffn / tp), (experts, hidden * ffn / tp)]
    ends = [(_vocabulary_matrices(model, stage), hidden * model.vocab_size / tp), (int(stage.last), hidden)]
    sizes = [*ends, *((stage.layers * count, size) for count, size in layer)]
    return sum(count * size for count, size in sizes if size < zero_sizes(recipe).param_persistence_threshold)


def reduce_bucket_size(recipe: Recipe, layout: Layout) -> int:
    """Elements of the bucket in which DeepSpeed reduces gradients: its default, or all gradients of a smaller model.

    DeepSpeed 0.19 allocates the whole bucket in every step, 2 GB in fp32, however few gradients there are.
    """
    stages = pipeline_stages(recipe, layout)
    most = max(sum(count for count, _ in parameters_on_rank(recipe.model, layout, stage)) for stage in stages)
    # Megatron-Core pads the vocabulary: each rank's part of embedding and head can have that many rows more
    padding = 2 * VOCABULARY_MULTIPLE * recipe.model.hidden_size
    return min(REDUCE_BUCKET_SIZE, math.ceil(most) + padding)


def live_parameters(recipe: Recipe, parameters: float) -> float:
    """Of `parameters` of a rank those that ZeRO 3 has gathered at once, which forward also keeps for backward.

    DeepSpeed 0.19 fetches ahead until stage3_max_live_parameters are there, and lets none go that it passed over
    because it was there already: the last of forward stay, however small stage3_max_reuse_distance is.
    """
    return min(parameters, zero_sizes(recipe).max_live_parameters)


def _buffers(recipe: Recipe, layout: Layout, stage: Stage, parameters: float) -> tuple[float, float]:
    """(bytes beside the activations, bytes once they are gone), as DeepSpeed 0.19 and Megatron-Core allocate them.

    During backward: with sequence parallelism one gathered input, H a token (of each expert in a mixture); in a
    ring of context parallelism two blocks of keys and values; at a pipeline stage's border one hidden state each way;
    one reduce bucket at ZeRO 1 in fp32, ZeRO 2 and ZeRO 3; ZeRO 3 also the gathered parameters.
    In bf16 ZeRO 2 and ZeRO 3 widen that bucket to fp32, in which gradients are reduced.
    After backward: the flat fp32 copy that is reduced, at most one bucket without ZeRO; bf16 at ZeRO 1 joins all of
    the gradients.
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
        return during, FP32 * min(ALLREDUCE_BUCKET_SIZE, parameters)
    if zero == 1 and half:
        return during, FP32 * parameters
    during += (element + (FP32 if half else 0)) * (
        zero_sizes(recipe).reduce_bucket_size or reduce_bucket_size(recipe, layout)
    )
    if zero == 3:
        during += element * live_parameters(recipe, parameters)
    return during, 0.0


def _unpacked_bytes(recipe: Recipe, layout: Layout, stage: Stage, parameters: float) -> float:
    """ZeRO 3 copies parameters that it fetched ahead out of what was received, which exists until the last is copied;
    that is over when the loss is reached."""
    if recipe.deepspeed.zero_stage < 3:
        return 0.0
    divided = parameters - persistent_parameters(recipe, layout, stage)
    return ELEMENT_BYTES[recipe.training.precision] * min(divided, zero_sizes(recipe).prefetch_bucket_size)
