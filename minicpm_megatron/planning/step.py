"""How long one optimizer step takes, and how much of the GPUs' peak it uses."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from minicpm_megatron.planning.cluster import Cluster
from minicpm_megatron.planning.communication import Traffic, Work, busiest_traffic, dealt_weights
from minicpm_megatron.recipe.checks import Layout, refuse_unless
from minicpm_megatron.recipe.flops import attention_flops_per_token, flops_per_token, head_flops_per_token
from minicpm_megatron.recipe.memory import (
    FP32,
    MemoryEstimate,
    estimate_memory,
    layer_elements,
    logits_bytes,
    parameters_by_role,
    parameters_on_rank,
    pipeline_stages,
    vocabulary_rows,
)
from minicpm_megatron.recipe.schema import Recipe
from minicpm_megatron.registry import OPTIMIZERS


@dataclass(frozen=True)
class Prediction:
    """One recipe on one layout.

    Attributes:
        memory: bytes on the fullest rank.
        products, memory_bound: seconds a step of the slowest stage in matrix products, and in what only moves memory.
        traffic: every kind of communication.
        optimizer: seconds of the update.
        micro_batches: m, of the first batch size of the run.
        step_seconds: all of it, bubble included.
        tokens_per_second: of all GPUs together.
        utilisation: model FLOP/s over the stated peak.
    """

    recipe: Recipe
    layout: Layout
    memory: MemoryEstimate
    products: float
    memory_bound: float
    traffic: tuple[Traffic, ...]
    optimizer: float
    micro_batches: int
    step_seconds: float
    tokens_per_second: float
    utilisation: float

    @property
    def bubble(self) -> float:
        """Idle fraction of the pipeline's time, (p - 1) / (m + p - 1).

        Narayanan et al. 2021, section 2.2.1, has (p - 1) / m of the time without it.
        """
        stages = self.layout.pipeline_model_parallel_size
        return (stages - 1) / (self.micro_batches + stages - 1)

    @property
    def bubble_seconds(self) -> float:
        """Seconds a step that the slowest stage waits for the others."""
        busy = self.products + self.memory_bound + sum(self.micro_batches * t.micro_batch_seconds for t in self.traffic)
        return busy * (self.layout.pipeline_model_parallel_size - 1) / self.micro_batches

    @property
    def exposed_seconds(self) -> float:
        """Exposed seconds a step of all kinds."""
        return sum(each.exposed(self.micro_batches) for each in self.traffic)


def predict(recipe: Recipe, cluster: Cluster) -> Prediction:
    """The step of `recipe` with its own parallel sizes on all GPUs of `cluster`.

    step = (m + p - 1) (products + memory-bound + exposed communication of a micro-batch) + reductions + optimizer.

    Raises:
        UserError: the recipe does not fit the number of GPUs, or is not in bf16, whose peaks alone are stated.
    """
    refuse_unless(
        recipe.training.precision == "bf16",
        "training.precision",
        f"peak rates are stated for bf16, not for {recipe.training.precision}",
        "set it to bf16",
    )
    layout = recipe.check_world_size(cluster.gpus)
    stages = [Work(recipe, layout, cluster, stage) for stage in pipeline_stages(recipe, layout)]
    products, memory_bound = max(map(stage_seconds, stages), key=sum)
    micro_batches = layout.gradient_accumulation_steps[0]
    traffic = busiest_traffic(stages, micro_batches)
    micro_batch = products + memory_bound + sum(each.micro_batch_seconds for each in traffic)
    optimizer = max(map(optimizer_seconds, stages))
    step = (micro_batches + len(stages) - 1) * micro_batch + sum(each.step_seconds for each in traffic) + optimizer
    tokens = recipe.training.global_batch_size * recipe.data.sequence_length
    model_flops = tokens * flops_per_token(recipe.model, recipe.data.sequence_length)
    return Prediction(
        recipe=recipe,
        layout=layout,
        memory=estimate_memory(recipe, layout),
        products=micro_batches * products,
        memory_bound=micro_batches * memory_bound,
        traffic=traffic,
        optimizer=optimizer,
        micro_batches=micro_batches,
        step_seconds=step,
        tokens_per_second=tokens / step,
        utilisation=model_flops / step / (cluster.gpus * cluster.gpu.flops),
    )


def stage_seconds(work: Work) -> tuple[float, float]:
    """(matrix products, memory-bound operations) of one micro-batch on one rank of a stage.

    Products: `flops_per_token` of the stage's layers, and of the head on the last, over tp; what is recomputed costs
    its forward again, a third. Attention is counted as if not causal: flash kernels do 7/12 of that at a lower rate.
    Memory: each kept element of a layer (`layer_elements`) is written and read in forward, read in backward, and its
    gradient written and read: 5 passes, 7 with full recompute; logits are written and read, fused ones in the run's
    precision twice; gradients are added up.
    """
    recipe, layout, model, stage = work.recipe, work.layout, work.recipe.model, work.stage
    length, recompute = recipe.data.sequence_length, recipe.training.recompute
    attention = attention_flops_per_token(model, length)
    layers = flops_per_token(model, length) - head_flops_per_token(model)
    again = {"none": 0.0, "selective": attention / 3, "full": layers / 3}[recompute]
    flops = (layers + again) * stage.layers / model.num_layers + (head_flops_per_token(model) if stage.last else 0.0)
    moved = (
        stage.layers * layer_elements(recipe, layout) * work.tokens * work.element * (7 if recompute == "full" else 5)
    )
    if stage.last and recipe.training.fused_loss:
        moved += 4 * work.tokens * vocabulary_rows(model, layout) * work.element
    elif stage.last:
        moved += 2 * logits_bytes(recipe, layout)
    for count, replicas in parameters_on_rank(model, layout, stage):
        moved += count * (work.element + 2 * _gradient_sum_bytes(recipe, replicas))
    products = work.cluster.product_seconds(work.tokens * flops / layout.tensor_model_parallel_size)
    return products, work.cluster.memory_seconds(moved)


def _gradient_sum_bytes(recipe: Recipe, replicas: int) -> float:
    """Bytes a parameter of the sum over micro-batches, which is read and written for each of them."""
    zero = recipe.deepspeed.zero_stage
    return 2.0 if zero == 0 else FP32 / (replicas if zero >= 2 else 1)


def optimizer_seconds(work: Work) -> float:
    """An update reads and writes the moments (Adam's two) and the fp32 weights, reads an fp32 gradient and writes the
    new weight: Adam 28 + e bytes for each parameter the rank updates. An optimizer of whole matrices computes them
    besides; the busiest rank counts."""
    optimizer = work.recipe.optimizer
    spec = OPTIMIZERS.get(optimizer.name)
    divided = work.recipe.deepspeed.zero_stage >= 1
    moved = sum(
        count / (replicas if divided else 1) * (2 * (spec.state_bytes(role) + FP32) + FP32 + work.element)
        for role, count, replicas in parameters_by_role(work.recipe.model, work.layout, work.stage)
    )
    flops = 0.0
    if spec.matrix_flops is not None:
        # layers repeat a handful of shapes
        shapes = Counter((rows, weight.columns) for weight in dealt_weights(work) for rows in weight.rows)
        flops = sum(count * spec.matrix_flops(*shape, optimizer) for shape, count in shapes.items())
    return work.cluster.memory_seconds(moved) + work.cluster.product_seconds(flops)
