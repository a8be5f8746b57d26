"""Bytes that one GPU sends for each kind of parallelism, and how long it waits for them.

T are the tokens of a micro-batch on the rank, H hidden_size, e bytes an element, L the layers of the pipeline stage, m
micro-batches a step. Sent is counted as rings send it: of M bytes among n ranks an all-gather, a reduce-scatter and an
all-to-all send M (n - 1) / n, an all-reduce twice that, a point-to-point message M. Messages of a few bytes (norms,
losses to be printed, flags) are not counted. `benchmarks/plan_check.py` counts the same in real runs.
No overlap with computation is counted, since the engine turns DeepSpeed's off, but for the ring of context parallelism,
which hides behind attention by construction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from minicpm_megatron.planning.cluster import Cluster
from minicpm_megatron.recipe.checks import Layout
from minicpm_megatron.recipe.flops import attention_flops_per_token
from minicpm_megatron.recipe.matrices import Weight, weights_of_roles
from minicpm_megatron.recipe.memory import (
    ELEMENT_BYTES,
    FP32,
    Stage,
    exchanged_groups,
    live_parameters,
    parameters_by_role,
    parameters_on_rank,
    persistent_parameters,
    tokens_on_rank,
)
from minicpm_megatron.recipe.schema import Recipe
from minicpm_megatron.registry import OPTIMIZERS


@dataclass(frozen=True)
class Traffic:
    """One kind of communication of one GPU.

    Attributes:
        kind: what it is for.
        micro_batch_bytes, step_bytes: sent for each micro-batch, and once a step besides.
        micro_batch_seconds, step_seconds: exposed, that is, not hidden behind computation.
    """

    kind: str
    micro_batch_bytes: float = 0.0
    step_bytes: float = 0.0
    micro_batch_seconds: float = 0.0
    step_seconds: float = 0.0

    def sent(self, micro_batches: int) -> float:
        """Bytes of a step."""
        return micro_batches * self.micro_batch_bytes + self.step_bytes

    def exposed(self, micro_batches: int) -> float:
        """Exposed seconds of a step."""
        return micro_batches * self.micro_batch_seconds + self.step_seconds


@dataclass(frozen=True)
class Work:
    """What the formulas need of one pipeline stage of one recipe on one layout of one cluster."""

    recipe: Recipe
    layout: Layout
    cluster: Cluster
    stage: Stage

    @property
    def tokens(self) -> float:
        return tokens_on_rank(self.recipe, self.layout)

    @property
    def element(self) -> int:
        return ELEMENT_BYTES[self.recipe.training.precision]

    @property
    def hidden_bytes(self) -> float:
        """One hidden state of a micro-batch: T H e."""
        return self.tokens * self.recipe.model.hidden_size * self.element

    @property
    def ranks_of_stage(self) -> int:
        """Ranks that together hold a pipeline stage."""
        return self.layout.world_size // self.layout.pipeline_model_parallel_size

    @property
    def experts_per_token(self) -> int:
        return 1 if self.recipe.model.num_moe_experts is None else self.recipe.model.moe_router_topk

    def passes(self, repeated: str) -> int:
        """Forward and backward, and a second forward of what is recomputed ("full": layers; "selective": attention)."""
        again = self.recipe.training.recompute
        return 3 if again == "full" or again == repeated else 2


def all_traffic(work: Work) -> list[Traffic]:
    """Every kind, those included for which nothing is sent."""
    return [
        tensor_parallel(work),
        pipeline_parallel(work),
        context_parallel(work),
        expert_parallel(work),
        *data_parallel(work),
        whole_matrices(work),
    ]


def busiest_traffic(stages: Sequence[Work], micro_batches: int) -> tuple[Traffic, ...]:
    """Every kind as the stage has it that sends most of it."""
    kinds = zip(*map(all_traffic, stages), strict=True)
    return tuple(max(kind, key=lambda each: each.sent(micro_batches)) for kind in kinds)


def tensor_parallel(work: Work) -> Traffic:
    """What tensor-parallel ranks exchange, in units of u = T H e (tp - 1) / tp.

    Sequence parallelism (Korthikanti et al. 2022, section 4.2.2): each of a layer's two blocks gathers its input and
    scatters its output in forward, mirrors both in backward and gathers the input once more for the weights' gradients:
    5 u a block, 7 u with full recompute. The embedding scatters and gathers, 2 u; the head gathers once (without the
    fused loss twice) and scatters; gradients of norms' weights are all-reduced.
    Without it (Shoeybi et al. 2019, arXiv 1909.08053) a block all-reduces its output in forward and its input's
    gradient in backward: 4 u, 6 u with full recompute; embedding and head 2 u each; pipeline stages send
    parts of what is whole on every rank, so that each gathers its input, its output again and the gradient of that.
    The fused loss gathers two fp32 numbers a token from every rank, the other one all-reduces three. The experts of a
    mixture gather the k copies of a token and scatter their output, in fp32, in every pass: k (1 + 4 / e) u.
    """
    tp, stage, sequence_parallel = (
        work.layout.tensor_model_parallel_size,
        work.stage,
        work.recipe.parallel.sequence_parallel,
    )
    fused = work.recipe.training.fused_loss
    passes, head = work.passes("full"), 3 if sequence_parallel and not fused else 2
    block = mlp = 2 * passes + sequence_parallel
    if work.recipe.model.num_moe_experts is not None:
        mlp = passes * work.experts_per_token * (1 + FP32 // work.element)
    units = stage.layers * (block + mlp) + 2 * stage.first + head * stage.last
    if not sequence_parallel:
        units += (not stage.first) + 2 * (not stage.last)
    gathered = 2 * FP32 * work.tokens * tp * stage.last if fused else 0.0
    reduced = 0.0 if fused else 3 * FP32 * work.tokens * stage.last
    if sequence_parallel:
        reduced += (2 * stage.layers + stage.last) * work.recipe.model.hidden_size * work.element
    sent = (units * work.hidden_bytes + 2 * reduced + gathered) * (tp - 1) / tp
    return Traffic("tensor", sent, micro_batch_seconds=work.cluster.gather_seconds(sent, tp, 1))


def pipeline_parallel(work: Work) -> Traffic:
    """Point-to-point: T H e / tp to the next stage and as much back to the one before for each micro-batch (Narayanan
    et al. 2021, arXiv 2104.04473, section 4.1), and once a step the all-reduce of a tied embedding's gradient between
    first and last stage: V H / tp in the precision in which gradients are summed."""
    layout, model, stage = work.layout, work.recipe.model, work.stage
    tp, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    if stages == 1:
        return Traffic("pipeline")
    stride = work.ranks_of_stage
    one_way = work.hidden_bytes / tp
    tied = 0.0
    if (stage.first or stage.last) and not model.untie_embeddings_and_output_weights:
        # in bf16 a pipeline is at ZeRO 1, which sums in fp32; two ranks all-reduce with 2 (n - 1) / n = 1
        tied = model.vocab_size * model.hidden_size * FP32 / tp
    return Traffic(
        "pipeline",
        one_way * ((not stage.first) + (not stage.last)),
        tied,
        work.cluster.neighbour_seconds(2 * one_way, stages, stride),
        work.cluster.neighbour_seconds(tied, stages, stride),
    )


def context_parallel(work: Work) -> Traffic:
    """Attention over the cp ranks of a sequence, by parallel.cp_comm_type.

    p2p, the ring (Liu et al. 2023, arXiv 2310.01889): keys and values, 2 T n_kv d e / tp, go round in cp - 1 steps, in
    backward again, and their gradients go home in cp steps, in fp32. Exposed is what takes longer than (cp - 1) / cp of
    attention.
    a2a (Jacobs et al. 2023, arXiv 2309.14509): queries, keys, values and output change from a part of the sequence to a
    part of the heads, T (2 n_q + 2 n_kv) d e / tp x (cp - 1) / cp each in forward and backward; n_kv counts what is
    repeated where several ranks need a group.
    """
    layout, model, cp = work.layout, work.recipe.model, work.layout.context_parallel_size
    tp, passes = layout.tensor_model_parallel_size, work.passes("selective")
    if cp == 1:
        return Traffic("context")
    channels = work.stage.layers * work.tokens * model.kv_channels / tp
    if work.recipe.parallel.cp_comm_type == "a2a":
        heads = 2 * (model.num_attention_heads + exchanged_groups(model, layout))
        sent = passes * heads * channels * work.element * (cp - 1) / cp
        return Traffic("context", sent, micro_batch_seconds=work.cluster.all_to_all_seconds(sent, cp, tp))
    sent = 2 * model.num_query_groups * channels * (passes * (cp - 1) * work.element + cp * FP32)
    attention = work.tokens * attention_flops_per_token(model, work.recipe.data.sequence_length)
    hidden = work.cluster.product_seconds(attention * work.stage.layers / model.num_layers / tp) * (cp - 1) / cp
    exposed = max(0.0, work.cluster.neighbour_seconds(sent, cp, tp) - hidden)
    return Traffic("context", sent, micro_batch_seconds=exposed)


def expert_parallel(work: Work) -> Traffic:
    """All-to-all of tokens to their k experts and back in every pass (Lepikhin et al. 2020, arXiv 2006.16668): T k H e
    / tp x (ep - 1) / ep twice a pass and layer, and a token's fp32 weights once; experts evenly loaded."""
    layout, ep = work.layout, work.layout.expert_model_parallel_size
    tp = layout.tensor_model_parallel_size
    each = work.experts_per_token * (2 * work.hidden_bytes + FP32 * work.tokens) / tp * (ep - 1) / ep
    sent = work.passes("full") * work.stage.layers * each
    return Traffic("expert", sent, micro_batch_seconds=work.cluster.all_to_all_seconds(sent, ep, tp))


def data_parallel(work: Work) -> tuple[Traffic, Traffic]:
    """Gradients and weights between the n ranks that hold the same P parameters (Rajbhandari et al. 2020, section 7),
    with x = P e (n - 1) / n for weights and g = 4 P (n - 1) / n for gradients, which are reduced in fp32.

    ZeRO 0: all-reduce of gradients 2 g. ZeRO 1: the same (DeepSpeed 0.19 all-reduces where the paper scatters), and x
    to gather the new weights. ZeRO 2: gradients are reduced after every micro-batch, m 2 g. ZeRO 3: gradients m g
    (reduce-scatter); weights m x, and what forward does not keep for backward (`live_parameters`) again; parameters too
    small to divide are gathered once a step.
    """
    recipe, layout, zero = work.recipe, work.layout, work.recipe.deepspeed.zero_stage
    tp = layout.tensor_model_parallel_size
    strides = (tp, tp * layout.expert_model_parallel_size)
    sent = seconds = total = 0.0
    for (count, replicas), stride in zip(parameters_on_rank(recipe.model, layout, work.stage), strides, strict=False):
        once = count * work.element * (replicas - 1) / replicas
        sent += once
        seconds += work.cluster.gather_seconds(once, replicas, stride)
        total += count
    reduce = FP32 / work.element * (1 if zero == 3 else 2)
    gradients = _each("gradients", reduce * sent, reduce * seconds, micro_batch=zero >= 2)
    if zero < 3:
        return gradients, _each("weights", min(zero, 1) * sent, min(zero, 1) * seconds, micro_batch=False)
    persistent = persistent_parameters(recipe, layout, work.stage)
    kept = persistent / total
    often = 1 - kept + (total - persistent - live_parameters(recipe, total - persistent)) / total
    return gradients, Traffic("weights", often * sent, kept * sent, often * seconds, kept * seconds)


def whole_matrices(work: Work) -> Traffic:
    """Once a step, for an optimizer of whole matrices, fp32 parts of weights and of their updates.

    With N = tp cp dp ranks in a stage, w elements of the weights dealt to the busiest rank and p elements that a rank
    holds: the parts of each weight are sent to the rank that computes its update, and those of the update back,
    4 (w + p) (N - 1) / N. Without ZeRO the n ranks that hold the same have one of them take part, which passes the
    result on: 8 w (N - 1) / N, nothing where each rank has whole weights, and 4 p (n - 1) / n.
    """
    recipe, layout, spec = work.recipe, work.layout, OPTIMIZERS.get(work.recipe.optimizer.name)
    ranks, divided = work.ranks_of_stage, recipe.deepspeed.zero_stage >= 1
    dealt = sum(weight.elements for weight in dealt_weights(work))
    held = passed_on = 0.0
    for role, count, replicas in parameters_by_role(recipe.model, layout, work.stage):
        if role in spec.whole_matrices:
            held += count / replicas if divided else 0.0
            passed_on += 0.0 if divided else count * (replicas - 1) / replicas
    if not divided:
        whole = layout.tensor_model_parallel_size == layout.expert_model_parallel_size == 1
        dealt, held = (0, 0.0) if whole else (dealt, dealt)
    exchanged = FP32 * (dealt + held) * (ranks - 1) / ranks
    seconds = work.cluster.all_to_all_seconds(exchanged, ranks, 1)
    tp, replicas = layout.tensor_model_parallel_size, ranks // layout.tensor_model_parallel_size
    seconds += work.cluster.gather_seconds(FP32 * passed_on, replicas, tp)
    return Traffic("matrices", step_bytes=exchanged + FP32 * passed_on, step_seconds=seconds)


def dealt_weights(work: Work) -> list[Weight]:
    """Weights of which the busiest rank of a stage computes the updates; dealt out as `engine.whole_matrices` does."""
    roles = OPTIMIZERS.get(work.recipe.optimizer.name).whole_matrices
    weights = weights_of_roles(work.recipe.model, work.stage.layers, roles)
    weights.sort(key=lambda weight: weight.cost, reverse=True)
    return weights[:: work.ranks_of_stage]


def _each(kind: str, sent: float, seconds: float, *, micro_batch: bool) -> Traffic:
    if micro_batch:
        return Traffic(kind, micro_batch_bytes=sent, micro_batch_seconds=seconds)
    return Traffic(kind, step_bytes=sent, step_seconds=seconds)
