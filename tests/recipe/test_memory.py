"""The estimate against tensors that torch really keeps, and against how it must move with the layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from minicpm_megatron.recipe import build, count_parameters
from minicpm_megatron.recipe.memory import (
    MemoryEstimate,
    estimate_memory,
    offloaded_bytes,
    pipeline_stages,
    reduce_bucket_size,
    stage_memory,
)
from tests.recipe.fields import minimal_fields

DENSE = {
    "preset": "minicpm-2.4b",
    "data__sequence_length": 4096,
    "training": {"global_batch_size": 8, "micro_batch_size": 1},
}


def estimate(world_size: int, **changes: Any) -> MemoryEstimate:
    recipe = build(minimal_fields(**(DENSE | changes)))
    return estimate_memory(recipe, recipe.check_world_size(world_size))


def test_state_of_one_rank_is_bytes_times_parameters() -> None:
    total = count_parameters(build(minimal_fields(**DENSE)).model).total
    plain = estimate(1, deepspeed__zero_stage=0)
    assert (plain.weights, plain.gradients, plain.optimizer) == (2 * total, 4 * total, 12 * total)
    training = DENSE["training"] | {"precision": "fp32"}
    single = estimate(1, deepspeed__zero_stage=0, training=training)
    assert (single.weights, single.gradients, single.optimizer) == (4 * total, 4 * total, 8 * total)


def test_each_zero_stage_divides_one_part_more() -> None:
    total = count_parameters(build(minimal_fields(**DENSE)).model).total
    parts = [estimate(4, deepspeed__zero_stage=stage) for stage in range(4)]
    assert [part.optimizer for part in parts] == [12 * total, 3 * total, 3 * total, 3 * total]
    assert [part.gradients for part in parts] == [4 * total, 6 * total, total, total]
    assert [part.weights for part in parts] == [2 * total, 2 * total, 2 * total, total // 2]


def test_what_gradient_statistics_keep_is_counted_where_it_lies() -> None:
    total = count_parameters(build(minimal_fields(**DENSE)).model).total
    measured = {"logging": {"gradient_statistics": {"interval": 1}}}
    for stage, more in (
        (0, 8 * total),
        (1, 2 * total),
        (3, 2 * total),
    ):  # a weight and a gradient, both fp32
        plain, kept = (estimate(4, deepspeed__zero_stage=stage, **each) for each in ({}, measured))
        assert kept.gradients - plain.gradients == more and kept.total - plain.total == more
    offloaded = {"deepspeed": {"zero_stage": 2, "offload_optimizer": "cpu"}}
    assert estimate(4, **offloaded, **measured) == estimate(4, **offloaded)
    recipe = build(minimal_fields(**(DENSE | offloaded | measured)))
    assert offloaded_bytes(recipe, recipe.check_world_size(4)) == (16 + 8) * total / 4


def test_what_is_offloaded_is_on_the_host() -> None:
    total = count_parameters(build(minimal_fields(**DENSE)).model).total
    for settings, host in (
        ({"zero_stage": 1}, 0),
        ({"zero_stage": 1, "offload_optimizer": "cpu"}, 16 * total / 4),
        ({"zero_stage": 3, "offload_optimizer": "cpu", "offload_param": "cpu"}, 18 * total / 4),
    ):
        recipe = build(minimal_fields(**(DENSE | {"deepspeed": settings})))
        layout = recipe.check_world_size(4)
        assert offloaded_bytes(recipe, layout) == host
        memory = estimate_memory(recipe, layout)
        assert (memory.optimizer == 0, memory.weights == 0) == (host > 0, "offload_param" in settings)


def test_tensor_parallelism_divides_all_but_the_norms() -> None:
    one, two = estimate(1), estimate(2, parallel__tensor_model_parallel_size=2)
    norms = 2 * (40 * 2 + 1) * 2304
    assert two.weights == (one.weights - norms) // 2 + norms
    assert one.activations / 2 < two.activations < one.activations
    split = estimate(2, parallel={"tensor_model_parallel_size": 2, "sequence_parallel": True})
    assert split.activations == one.activations // 2
    # 512 MiB of logits are 2,048 of 4,096 tokens' or all of those of half the vocabulary; the head's input is whole
    entry = 4096 * 2304 * 2
    assert two.working - entry == pytest.approx(2 * 61377 * (4096 + 2304))
    assert one.working - entry == pytest.approx(2 * 122753 * (2048 + 2304))


def test_full_recompute_keeps_the_inputs_and_works_on_one_layer() -> None:
    none, full = estimate(1), estimate(1, training=DENSE["training"] | {"recompute": "full"})
    # with d_ff = 2.5 d_model and ungrouped heads a layer keeps 22.5 d_model a token, its input is one of them; the
    # final norm keeps 2
    assert full.activations / none.activations == (40 + 2) / (40 * 22.5 + 2)
    # logits of half the tokens, and the gradients of the head and of its input, are more than a layer and the gradients
    # of its MLP, 2 d_ff + d_model
    tokens = 4096
    assert none.working == full.working == 2 * (2048 * 122753 + tokens * 2304 + 122753 * 2304)
    whole = estimate(1, training=DENSE["training"] | {"fused_loss": False})
    assert whole.working == tokens * 122753 * 6
    small = estimate(1, training=DENSE["training"] | {"recompute": "full"}, model={"vocab_size": 1000})
    head = 1000 * 2304 * 2
    assert small.working == tokens * 2304 * 2 * (22.5 + 5 + 1 - 1 - 2) + head


def test_sizes_in_the_json_are_used(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"reduce_bucket_size": 1e3, "stage3_prefetch_bucket_size": "auto"}}')
    whole, small = (estimate(4, deepspeed={"zero_stage": 2, "config": name}) for name in (None, str(path)))
    assert (whole.buffers, small.buffers) == ((2 + 4) * 500_000_000, (2 + 4) * 1000)


def test_a_small_model_gets_a_bucket_of_its_own_size() -> None:
    recipe = build(minimal_fields(training__precision="fp32"))
    layout = recipe.check_world_size(2)
    parameters = count_parameters(recipe.model).total
    assert parameters <= reduce_bucket_size(recipe, layout) <= parameters + 2 * 128 * recipe.model.hidden_size
    assert estimate_memory(recipe, layout).buffers == 4 * reduce_bucket_size(recipe, layout)
    large = build(minimal_fields(preset="minicpm-2.4b"))
    assert reduce_bucket_size(large, large.check_world_size(1)) == 500_000_000, "DeepSpeed's own"


def test_activations_of_a_layer_are_those_that_autograd_keeps() -> None:
    """A block as the model computes it, its saved tensors counted once each; weights and norms' statistics aside."""
    fields = minimal_fields(model={"num_layers": 1}, training__precision="fp32")
    recipe = build(fields)
    model, tokens = recipe.model, recipe.data.sequence_length * recipe.training.micro_batch_size
    batch, length = recipe.training.micro_batch_size, recipe.data.sequence_length
    heads, groups, channels = model.num_attention_heads, model.num_query_groups, model.kv_channels
    hidden, ffn = model.hidden_size, model.ffn_hidden_size
    weights = {
        name: torch.randn(shape, requires_grad=True)
        for name, shape in {
            "norm1": (hidden,), "qkv": ((heads + 2 * groups) * channels, hidden), "o": (hidden, heads * channels),
            "norm2": (hidden,), "gate and up": (2 * ffn, hidden), "down": (hidden, ffn), "norm": (hidden,),
            "head": (1, hidden),
        }.items()
    }  # fmt: skip
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if tensor.numel() >= tokens * channels and all(
            storage.data_ptr() != weight.untyped_storage().data_ptr() for weight in weights.values()
        ):
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    def rotate(x: torch.Tensor) -> torch.Tensor:
        angles = torch.ones(length, 1, channels // 2)
        first, second = x.chunk(2, -1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        x = torch.randn(batch, length, hidden, requires_grad=True) * 1.0
        normed = functional.rms_norm(x, (hidden,), weights["norm1"])
        qkv = functional.linear(normed, weights["qkv"]).view(batch, length, -1, channels)
        q, k, v = qkv.split([heads, groups, groups], 2)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
            attended = functional.scaled_dot_product_attention(
                *(each.transpose(1, 2) for each in (rotate(q), rotate(k), v)), is_causal=True, enable_gqa=True
            )
        x = x + functional.linear(attended.transpose(1, 2).reshape(batch, length, -1), weights["o"])
        normed = functional.rms_norm(x, (hidden,), weights["norm2"])
        gate, up = functional.linear(normed, weights["gate and up"]).chunk(2, -1)
        # Megatron-Core adds glu_linear_offset, 0, to the second factor
        x = x + functional.linear(functional.silu(gate) * (up + 0.0), weights["down"])
        functional.linear(functional.rms_norm(x, (hidden,), weights["norm"]), weights["head"])
    measured = sum(kept.values())
    layout = recipe.check_world_size(1)
    [stage] = pipeline_stages(recipe, layout)
    assert stage_memory(recipe, layout, stage, fused_norm=False).activations == measured
    fused = stage_memory(recipe, layout, stage).activations
    assert measured - fused == 3 * hidden * tokens * 4, "CPU's norm keeps the normalised input, too"
