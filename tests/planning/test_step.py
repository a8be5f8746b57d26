"""Memory and time of a step: by hand where that is possible, otherwise how they must move."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from minicpm_megatron.planning.cluster import Cluster
from minicpm_megatron.planning.step import predict, stage_seconds
from minicpm_megatron.recipe import get_preset
from minicpm_megatron.recipe.flops import flops_per_token
from minicpm_megatron.recipe.memory import estimate_memory, pipeline_stages
from tests.planning.tiny import GPU, PARAMETERS, recipe, work

PIPELINE = {"pipeline_model_parallel_size": 2, "pipeline_layers": [3, 1]}


def test_a_step_on_one_gpu_by_hand() -> None:
    one = predict(recipe(), Cluster(GPU, 1, 8))
    # 6 FLOPs a weight, the embedding's as the head, and 12 x layers x heads x channels x tokens
    flops = 6 * PARAMETERS + 12 * 4 * 4 * 2 * 16
    assert flops_per_token(recipe().model, 16) == flops
    assert one.products == pytest.approx(8 * 16 * flops / 0.6e12)
    # kept a token and layer: 4 x 8, queries, keys and values 8 + 4 + 4, rotated 8 + 4, output 8, MLP 5 x 16
    kept, logits = 4 * 16 * (32 + 16 + 12 + 8 + 80) * 2, 16 * 32 * 4
    assert one.memory_bound == pytest.approx(8 * (5 * kept + 2 * logits + PARAMETERS * (2 + 2 * 4)) / 0.8e9)
    assert one.optimizer == pytest.approx(PARAMETERS * 30 / 0.8e9)
    assert one.step_seconds == pytest.approx(one.products + one.memory_bound + one.optimizer)
    assert one.tokens_per_second == pytest.approx(8 * 16 / one.step_seconds)
    assert one.utilisation == pytest.approx(8 * 16 * flops / one.step_seconds / 1e12)


def test_recompute_repeats_a_forward() -> None:
    seconds = {
        again: stage_seconds(one)
        for again in ("none", "selective", "full")
        for one in [work(1, training={"recompute": again})]
    }
    head, attention = 6 * 32 * 8, 12 * 4 * 4 * 2 * 16
    layers = 6 * PARAMETERS + attention - head
    assert seconds["selective"][0] - seconds["none"][0] == pytest.approx(16 * attention / 3 / 0.6e12)
    assert seconds["full"][0] - seconds["none"][0] == pytest.approx(16 * layers / 3 / 0.6e12)
    assert seconds["full"][1] - seconds["none"][1] == pytest.approx(2 * 4 * 16 * 148 * 2 / 0.8e9)


@pytest.mark.parametrize("gpus", [2, 4])
def test_the_parts_add_up_to_the_step(gpus: int) -> None:
    one = predict(recipe(parallel=PIPELINE), Cluster(GPU, gpus, 8))
    parts = one.products + one.memory_bound + one.exposed_seconds + one.bubble_seconds + one.optimizer
    assert parts == pytest.approx(one.step_seconds)
    assert one.bubble == 1 / (8 // (gpus // 2) + 1)
    pipeline_time = one.step_seconds - one.optimizer - sum(each.step_seconds for each in one.traffic)
    assert one.bubble_seconds / pipeline_time == pytest.approx(one.bubble)


def test_the_slowest_stage_sets_the_pace() -> None:
    stages = [work(2, stage, parallel=PIPELINE) for stage in range(2)]
    first, last = (stage_seconds(stage)[0] for stage in stages)
    head, attention = 6 * 32 * 8, 12 * 4 * 2 * 16
    layer = 6 * (592 + 8 / 4) + attention
    assert first == pytest.approx(16 * 3 * layer / 0.6e12)
    assert last == pytest.approx(16 * (layer + head) / 0.6e12)
    assert predict(stages[0].recipe, stages[0].cluster).products == pytest.approx(8 * max(first, last))


def test_memory_parts_add_up_and_zero_divides_what_it_should() -> None:
    parts = [predict(recipe(deepspeed__zero_stage=stage), Cluster(GPU, 4, 8)).memory for stage in range(4)]
    assert [each.weights for each in parts] == [2 * PARAMETERS] * 3 + [PARAMETERS // 2]
    assert [each.gradients for each in parts] == [4 * PARAMETERS, 6 * PARAMETERS] + [PARAMETERS] * 2
    assert [each.optimizer for each in parts] == [12 * PARAMETERS] + [3 * PARAMETERS] * 3
    assert len({(each.activations, each.working) for each in parts}) == 1
    for each in parts:
        assert each.total == sum(asdict(each).values())


def test_each_stage_keeps_what_it_holds() -> None:
    one = work(2, parallel=PIPELINE)
    first, last = pipeline_stages(one.recipe, one.layout)
    assert (first.layers, first.first, first.last, first.in_flight) == (3, True, False, 2)
    assert (last.layers, last.first, last.last, last.in_flight) == (1, False, True, 1)
    memory = estimate_memory(one.recipe, one.layout)
    assert memory.weights == 2 * (3 * 592 + 32 * 8)
    assert memory.activations == 2 * (3 * 148 + 8) * 16 * 2, "with the output, until its gradient comes"
    assert memory.working == (2 * 16 + 8) * 16 * 2, "logits are on the other stage"


def test_a_pipeline_keeps_no_more_micro_batches_than_there_are() -> None:
    one = work(2, parallel=PIPELINE, training={"global_batch_size": 1})
    assert pipeline_stages(one.recipe, one.layout)[0].in_flight == 1


@pytest.mark.parametrize(("stage", "live"), [(2, 0), (3, PARAMETERS)], ids=["ZeRO 2", "ZeRO 3"])
def test_a_reduce_bucket_is_as_large_as_the_model(stage: int, live: int) -> None:
    memory = predict(recipe(deepspeed__zero_stage=stage), Cluster(GPU, 4, 8)).memory
    # a bucket in bf16 and, while it is reduced, in fp32; with room for the padding of embedding and head, 128 rows each
    assert memory.buffers == (2 + 4) * (PARAMETERS + 2 * 128 * 8) + 2 * live


def test_a_reduce_bucket_is_never_above_deepspeeds_default() -> None:
    large = recipe(deepspeed__zero_stage=2).model_copy(update={"model": get_preset("minicpm-2.4b")})
    assert predict(large, Cluster(GPU, 4, 8)).memory.buffers == (2 + 4) * 500_000_000


def test_what_zero_1_reduces_takes_the_place_of_the_activations() -> None:
    memory = predict(recipe(), Cluster(GPU, 4, 8)).memory
    # 16 tokens x 4 layers of 148 and a norm of 16, and 32 logits, one gradient of 8 hidden units and that of the head,
    # are gone when fp32 gradients, 4 a parameter, are joined
    assert memory.activations + memory.working == 16 * (4 * 148 + 16) * 2 + (16 * (32 + 8) + 32 * 8) * 2
    assert memory.buffers == max(0, 4 * PARAMETERS - memory.activations - memory.working)
    one_layer = predict(recipe(data__sequence_length=2), Cluster(GPU, 4, 8)).memory
    assert one_layer.buffers == 4 * PARAMETERS - one_layer.activations - one_layer.working > 0
