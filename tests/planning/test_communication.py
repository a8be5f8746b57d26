"""Bytes and seconds of every kind of parallelism, worked by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.planning import communication
from minicpm_megatron.planning.cluster import Cluster
from minicpm_megatron.recipe import count_parameters
from tests.planning.tiny import GPU, PARAMETERS, recipe, work

HIDDEN = 256  # bytes of one hidden state of a micro-batch
TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def moe(**parallel: Any) -> dict[str, Any]:
    return {"model": {"num_moe_experts": 4, "moe_router_topk": 2}, "parallel": parallel}


def test_the_model_is_the_one_counted_by_hand() -> None:
    assert count_parameters(recipe().model).total == PARAMETERS


# a rank's part of a hidden state, 128 bytes, is a unit; 16 tokens have 2 fp32 numbers each in the loss
LOSS = 2 * 4 * 16


def test_sequence_parallelism_gathers_and_scatters_ten_times_a_layer() -> None:
    traffic = communication.tensor_parallel(work(2, parallel=TP2))
    # 2 for the embedding and 2 for the head; 9 norms of 8 weights of 2 bytes are all-reduced
    assert traffic.micro_batch_bytes == (4 * 10 + 4) * HIDDEN / 2 + LOSS + 9 * 16
    assert traffic.micro_batch_seconds == pytest.approx(traffic.micro_batch_bytes / 0.8e8)
    again = communication.tensor_parallel(work(2, parallel=TP2, training={"recompute": "full"}))
    assert again.micro_batch_bytes == (4 * 14 + 4) * HIDDEN / 2 + LOSS + 9 * 16


def test_without_it_four_all_reduces_a_layer() -> None:
    alone = {"tensor_model_parallel_size": 2}
    assert communication.tensor_parallel(work(2, parallel=alone)).micro_batch_bytes == (4 * 8 + 4) * HIDDEN / 2 + LOSS
    again = communication.tensor_parallel(work(2, parallel=alone, training={"recompute": "full"}))
    assert again.micro_batch_bytes == (4 * 12 + 4) * HIDDEN / 2 + LOSS


@pytest.mark.parametrize(
    ("stage", "sequence_parallel", "units"),
    # the first has the embedding, the last the head; without sequence parallelism each gathers what it had in parts
    [(0, True, 2), (1, True, 0), (2, True, 2), (0, False, 2 + 2), (1, False, 3), (2, False, 2 + 1)],
)
def test_what_a_pipeline_stage_exchanges(stage: int, sequence_parallel: bool, units: int) -> None:
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 3, "pipeline_layers": [1, 1, 2]}
    one = work(6, stage, parallel=sizes | {"sequence_parallel": sequence_parallel})
    layers = one.stage.layers
    expected = (layers * (10 if sequence_parallel else 8) + units) * HIDDEN / 2 + LOSS * (stage == 2)
    expected += (2 * layers + (stage == 2)) * 16 * sequence_parallel
    assert communication.tensor_parallel(one).micro_batch_bytes == expected


def test_experts_gather_two_copies_of_a_token_and_scatter_twice_their_bytes() -> None:
    traffic = communication.tensor_parallel(work(2, **moe(**TP2)))
    assert traffic.micro_batch_bytes == (4 * (5 + 2 * 2 * (1 + 2)) + 4) * HIDDEN / 2 + LOSS + 9 * 16


@pytest.mark.parametrize(("stage", "ways", "tied"), [(0, 1, 1), (1, 2, 0), (2, 2, 0), (3, 1, 1)])
def test_a_stage_sends_each_way_and_the_tied_gradient_once(stage: int, ways: int, tied: int) -> None:
    traffic = communication.pipeline_parallel(work(4, stage, parallel={"pipeline_model_parallel_size": 4}))
    assert traffic.micro_batch_bytes == ways * HIDDEN
    assert traffic.step_bytes == tied * 32 * 8 * 4
    assert traffic.micro_batch_seconds == pytest.approx(2 * HIDDEN / 0.8e8)


def test_an_untied_head_needs_no_all_reduce() -> None:
    untied = work(2, parallel={"pipeline_model_parallel_size": 2}, model={"untie_embeddings_and_output_weights": True})
    assert communication.pipeline_parallel(untied).step_bytes == 0


def test_of_every_kind_the_busiest_stage_counts() -> None:
    stages = [work(4, stage, parallel={"pipeline_model_parallel_size": 4}) for stage in range(4)]
    _, pipeline, *_ = communication.busiest_traffic(stages, 1)
    assert (pipeline.micro_batch_bytes, pipeline.step_bytes) == (HIDDEN, 32 * 8 * 4)
    _, pipeline, *_ = communication.busiest_traffic(stages, 100)
    assert (pipeline.micro_batch_bytes, pipeline.step_bytes) == (2 * HIDDEN, 0)


def test_a_ring_turns_once_forward_and_twice_backward() -> None:
    # 4 tokens a rank: keys and values are 4 layers x 4 tokens x 2 x 2 groups x 2 channels; 2 bytes, gradients 4
    elements = 4 * 4 * 2 * 2 * 2
    traffic = communication.context_parallel(work(4, parallel={"context_parallel_size": 4}))
    assert traffic.micro_batch_bytes == elements * (2 * 3 * 2 + 4 * 4)
    again = work(4, parallel={"context_parallel_size": 4}, training={"recompute": "selective"})
    assert communication.context_parallel(again).micro_batch_bytes == elements * (3 * 3 * 2 + 4 * 4)


def test_all_to_all_exchanges_queries_keys_values_and_output() -> None:
    traffic = communication.context_parallel(work(2, parallel={"context_parallel_size": 2, "cp_comm_type": "a2a"}))
    assert traffic.micro_batch_bytes == 2 * (4 * 8 * (4 + 2 + 2 + 4) * 2 * 2) / 2
    assert traffic.micro_batch_seconds == pytest.approx(traffic.micro_batch_bytes / 0.8e8)
    # four ranks, two groups: each is sent to two ranks
    wider = communication.context_parallel(work(4, parallel={"context_parallel_size": 4, "cp_comm_type": "a2a"}))
    assert wider.micro_batch_bytes == 2 * (4 * 4 * (4 + 4 + 4 + 4) * 2 * 2) * 3 / 4


def test_tokens_go_to_their_experts_and_back() -> None:
    traffic = communication.expert_parallel(work(2, **moe(expert_model_parallel_size=2)))
    weights = 4 * HIDDEN / (8 * 2)  # fp32, one for each hidden state of 8 channels in bf16
    assert traffic.micro_batch_bytes == 2 * 4 * 2 * (2 * HIDDEN + weights) / 2


def test_experts_are_reduced_over_fewer_ranks() -> None:
    gradients, _ = communication.data_parallel(work(4, **moe(expert_model_parallel_size=2)))
    experts, router = 4 * 4 * 384 // 2, 4 * 4 * 8
    dense = PARAMETERS - 4 * 384 + router
    assert gradients.step_bytes == 2 * 4 * (dense * 3 / 4 + experts / 2)


@pytest.mark.parametrize(
    ("stage", "gradients", "weights"),
    # (each micro-batch, once a step) in units of the parameters' bf16 bytes that are elsewhere, of which an fp32
    # gradient has two; at ZeRO 3 all parameters here are smaller than what is divided
    [(0, (0, 4), (0, 0)), (1, (0, 4), (0, 1)), (2, (4, 0), (0, 1)), (3, (2, 0), (0, 1))],
)
def test_what_each_zero_stage_reduces_and_gathers(
    stage: int, gradients: tuple[int, int], weights: tuple[int, int]
) -> None:
    unit = PARAMETERS * 2 * 3 / 4
    found = communication.data_parallel(work(4, deepspeed__zero_stage=stage))
    assert [(each.micro_batch_bytes / unit, each.step_bytes / unit) for each in found] == [gradients, weights]


@pytest.mark.parametrize("stage", range(4))
def test_context_parallel_ranks_reduce_as_data_parallel_ranks_do(stage: int) -> None:
    alone = communication.data_parallel(work(2, deepspeed__zero_stage=stage))[0]
    shared = communication.data_parallel(work(2, deepspeed__zero_stage=stage, parallel={"context_parallel_size": 2}))[0]
    assert shared.sent(2) == alone.sent(2)


def test_what_zero_3_gathers_depends_on_the_sizes_in_the_json(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text(
        '{"zero_optimization": {"stage3_param_persistence_threshold": 9, "stage3_max_live_parameters": 1000}}'
    )
    _, weights = communication.data_parallel(work(4, deepspeed={"zero_stage": 3, "config": str(path)}))
    unit = 2 * 3 / 4
    # nine norms of 8 are kept, and of the others 1,000 from forward to backward
    assert weights.step_bytes == pytest.approx(72 * unit)
    assert weights.micro_batch_bytes == pytest.approx((PARAMETERS - 72 + PARAMETERS - 72 - 1000) * unit)


def test_nothing_is_sent_by_one_gpu() -> None:
    for traffic in communication.all_traffic(work(1)):
        assert (traffic.micro_batch_bytes, traffic.step_bytes) == (0, 0)
        assert (traffic.micro_batch_seconds, traffic.step_seconds) == (0, 0)


@pytest.mark.parametrize(
    ("size", "stride", "per_node", "near"),
    [(8, 1, 8, 8), (16, 1, 8, 8), (4, 2, 8, 4), (32, 2, 8, 4), (2, 8, 8, 1), (3, 1, 8, 1), (2, 1, 1, 1), (2, 1, 99, 2)],
)
def test_members_of_a_group_that_share_a_node(size: int, stride: int, per_node: int, near: int) -> None:
    assert Cluster(GPU, 48 if per_node < 48 else 24, per_node).members_per_node(size, stride) == near


def test_a_collective_waits_for_the_slower_of_node_and_network() -> None:
    cluster = Cluster(GPU, 16, 8)
    # 150 of 160 bytes are sent; the node takes in 80 over eight ports of 1e7
    assert cluster.gather_seconds(150, 16, 1) == pytest.approx(max(150 / 1e8, 80 / 8e7) / 0.8)
    # two ranks in two nodes: 80 of 160 bytes over one port
    assert cluster.gather_seconds(80, 2, 8) == pytest.approx(80 / 1e7 / 0.8)
    # of 15 others 7 are in the node
    assert cluster.all_to_all_seconds(150, 16, 1) == pytest.approx(max(70 / 1e8, 80 / 1e7) / 0.8)
    assert cluster.neighbour_seconds(80, 8, 1) == pytest.approx(80 / 1e8 / 0.8)
    assert cluster.neighbour_seconds(80, 16, 1) == pytest.approx(80 / 1e7 / 0.8)
