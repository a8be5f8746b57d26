"""Bytes that one GPU sends for each kind of parallelism, and how long it waits for them.

T are the tokens of a micro-batch on the rank, H hidden_size, e bytes an element, L the layers of the fullest pipeline
stage, m micro-batches a step. No overlap with computation is counted, since the engine turns DeepSpeed's off, but for
the ring of context parallelism, which hides behind attention by construction.
"""

from __future__ import annotations

from dataclasses import dataclass

from minicpm_megatron.planning.cluster import Cluster
from minicpm_megatron.recipe.checks import Layout
from minicpm_megatron.recipe.flops import attention_flops_per_token
from minicpm_megatron.recipe.memory import ELEMENT_BYTES, parameters_on_rank, pipeline_stages, tokens_on_rank
from minicpm_megatron.recipe.schema import Recipe


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


@dataclass(frozen=True)
class Work:
    """What the formulas need of one recipe on one layout of one cluster."""

    recipe: Recipe
    layout: Layout
    cluster: Cluster

    @property
    def tokens(self) -> float:
        return tokens_on_rank(self.recipe, self.layout)

    @property
    def element(self) -> int:
        return ELEMENT_BYTES[self.recipe.training.precision]

    @property
    def layers(self) -> int:
        return max(stage.layers for stage in pipeline_stages(self.recipe, self.layout))

    @property
    def hidden_bytes(self) -> float:
        """One hidden state of a micro-batch: T H e."""
        return self.tokens * self.recipe.model.hidden_size * self.element

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
    ]


def tensor_parallel(work: Work) -> Traffic:
    """All-gathers and reduce-scatters of tensor with sequence parallelism (Korthikanti et al. 2022, section 4.2.2).

    A layer has two blocks. Each gathers its input and scatters its output in forward, mirrors both in backward and
    gathers the input once more for the weights' gradients: 5 x T H e (tp - 1) / tp a block, 7 with full recompute. The
    experts' block of a mixture moves every token once for each of its k experts.
    """
    tp = work.layout.tensor_model_parallel_size
    each = 2 * work.passes("full") + 1
    blocks = 1 + work.experts_per_token
    sent = work.layers * each * blocks * work.hidden_bytes * (tp - 1) / tp
    return Traffic("tensor", sent, micro_batch_seconds=work.cluster.gather_seconds(sent, tp, 1))


def pipeline_parallel(work: Work) -> Traffic:
    """Point-to-point of a stage between two others: T H e / tp forward and as much backward for each micro-batch
    (Narayanan et al. 2021, arXiv 2104.04473, section 4.1), and once a step the all-reduce of a tied embedding's
    gradient between first and last stage, V H e / tp."""
    layout, model = work.layout, work.recipe.model
    tp, stages = layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size
    if stages == 1:
        return Traffic("pipeline")
    stride = layout.world_size // stages
    one_way = work.hidden_bytes / tp
    tied = (
        0.0 if model.untie_embeddings_and_output_weights else model.vocab_size * model.hidden_size * work.element / tp
    )
    return Traffic(
        "pipeline",
        one_way * min(2, stages - 1),
        tied,
        work.cluster.neighbour_seconds(2 * one_way, stages, stride),
        work.cluster.neighbour_seconds(tied, stages, stride),
    )


def context_parallel(work: Work) -> Traffic:
    """Attention over the cp ranks of a sequence, by parallel.cp_comm_type.

    p2p, the ring (Liu et al. 2023, arXiv 2310.01889): keys and values, 2 T n_kv d e / tp, go round in cp - 1 steps; in
    backward they do again, with their gradients. Exposed is what takes longer than (cp - 1) / cp of attention.
    a2a (Jacobs et al. 2023, arXiv 2309.14509): queries, keys, values and output change from a part of the sequence to a
    part of the heads, T (2 n_q + 2 n_kv) d e / tp x (cp - 1) / cp each in forward and backward; n_kv counts what is
    repeated where a rank has fewer than cp groups.
    """
    layout, model, cp = work.layout, work.recipe.model, work.layout.context_parallel_size
    tp, passes = layout.tensor_model_parallel_size, work.passes("selective")
    if cp == 1:
        return Traffic("context")
    channel_bytes = work.layers * work.tokens * model.kv_channels * work.element / tp
    if work.recipe.parallel.cp_comm_type == "a2a":
        heads = 2 * (model.num_attention_heads + max(model.num_query_groups, tp * cp))
        sent = passes * heads * channel_bytes * (cp - 1) / cp
        return Traffic("context", sent, micro_batch_seconds=work.cluster.all_to_all_seconds(sent, cp, tp))
    sent = (passes + 1) * (cp - 1) * 2 * model.num_query_groups * channel_bytes
    attention = work.tokens * attention_flops_per_token(model, work.recipe.data.sequence_length)
    hidden = work.cluster.product_seconds(attention * work.layers / model.num_layers / tp) * (cp - 1) / cp
    exposed = max(0.0, work.cluster.neighbour_seconds(sent, cp, tp) - hidden)
    return Traffic("context", sent, micro_batch_seconds=exposed)


def expert_parallel(work: Work) -> Traffic:
    """All-to-all of tokens to their k experts and back in every pass (Lepikhin et al. 2020, arXiv 2006.16668): T k H e
    / tp x (ep - 1) / ep twice a pass and layer, experts evenly loaded."""
    layout, ep = work.layout, work.layout.expert_model_parallel_size
    tp = layout.tensor_model_parallel_size
    each = work.experts_per_token * work.hidden_bytes / tp * (ep - 1) / ep
    sent = 2 * work.passes("full") * work.layers * each
    return Traffic("expert", sent, micro_batch_seconds=work.cluster.all_to_all_seconds(sent, ep, tp))


def data_parallel(work: Work) -> tuple[Traffic, Traffic]:
    """Gradients and weights between the n ranks that hold the same P parameters (Rajbhandari et al. 2020, section 7),
    with x = P e (n - 1) / n.

    ZeRO 0: all-reduce of gradients 2 x. ZeRO 1: the same (DeepSpeed 0.19 all-reduces where the paper scatters), and x
    to gather the new weights. ZeRO 2: gradients are reduced after every micro-batch, m 2 x. ZeRO 3: gradients m x
    (reduce-scatter), weights gathered in forward and in backward, m 2 x.
    """
    layout, zero = work.layout, work.recipe.deepspeed.zero_stage
    tp = layout.tensor_model_parallel_size
    strides = (tp, tp * layout.expert_model_parallel_size)
    fullest = max(
        (parameters_on_rank(work.recipe.model, layout, stage) for stage in pipeline_stages(work.recipe, layout)),
        key=lambda parameters: sum(count for count, _ in parameters),
    )
    sent = seconds = 0.0
    for (count, replicas), stride in zip(fullest, strides, strict=False):
        once = count * work.element * (replicas - 1) / replicas
        sent += once
        seconds += work.cluster.gather_seconds(once, replicas, stride)
    reduce, gather = (1 if zero == 3 else 2), (0, 1, 1, 2)[zero]
    return (
        _each("gradients", reduce * sent, reduce * seconds, micro_batch=zero >= 2),
        _each("weights", gather * sent, gather * seconds, micro_batch=zero == 3),
    )


def _each(kind: str, sent: float, seconds: float, *, micro_batch: bool) -> Traffic:
    if micro_batch:
        return Traffic(kind, micro_batch_bytes=sent, micro_batch_seconds=seconds)
    return Traffic(kind, step_bytes=sent, step_seconds=seconds)
