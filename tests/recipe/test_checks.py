"""Contradictions between fields: each is refused by the field to change, with what to do."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import build
from tests.recipe.fields import minimal_fields

GROWTH = [{"after_tokens": 10_000, "global_batch_size": 16}, {"after_tokens": 20_000, "global_batch_size": 32}]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"parallel__tensor_model_parallel_size": 3}, "parallel.tensor_model_parallel_size: 3 does not divide"),
        (
            {"parallel__tensor_model_parallel_size": 4},
            "4 does not divide model.num_query_groups 2; give a divisor of 2",
        ),
        (
            {"parallel__tensor_model_parallel_size": 2, "model__ffn_hidden_size": 161},
            "2 does not divide model.ffn_hidden_size 161",
        ),
        ({"parallel__sequence_parallel": True}, "parallel.sequence_parallel: .*of which there is one; set"),
        (
            {"parallel": {"sequence_parallel": True, "tensor_model_parallel_size": 2}, "data__sequence_length": 63},
            "data.sequence_length: 63 tokens do not divide over 2",
        ),
        ({"model__num_query_groups": 3}, "model.num_query_groups: 4 attention heads do not divide into 3"),
        (
            {"logging": {"gradient_statistics": {"interval": 1, "first_step": 9, "last_step": 8}}},
            "logging.gradient_statistics.last_step: 8 is before the first step, 9; give",
        ),
        ({"model__kv_channels": 15}, "model.kv_channels: .*15 is odd"),
        (
            {"model__rope_scaling": {"factor": 4.0}},
            "model.rope_scaling.factor: 4.0 is given, and model.rope_scaling.type none has no use for it; set",
        ),
        (
            {"model__rope_scaling": {"original_max_position_embeddings": 64}},
            "model.rope_scaling.original_max_position_embeddings: 64 is given, and .* no use for it",
        ),
        ({"model__rope_scaling": {"type": "ntk"}}, "model.rope_scaling.factor: ntk scaling needs its factor"),
        ({"model__rope_scaling": {"type": "ntk", "factor": 0.5}}, "model.rope_scaling.factor: 0.5 is refused"),
        ({"model__rope_scaling": {"type": "yarn", "factor": 4.0}}, "model.rope_scaling.type: 'yarn' is refused"),
        ({"model__rope_scaling": {"kind": "ntk"}}, "unknown key model.rope_scaling.kind"),
        (
            {"model__rope_scaling": {"type": "ntk", "factor": 4.0, "original_max_position_embeddings": 63}},
            "model.rope_scaling.factor: model.max_position_embeddings 256 is more than 4 times 63; give at least 4.06",
        ),
        (
            {"model__rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64}},
            "original_max_position_embeddings: 64 is not model.max_position_embeddings 256, where dynamic",
        ),
        (
            {"model__rope_scaling": {"type": "product", "factor": 4.0}, "model__kv_channels": 2},
            "model.kv_channels: product scaling divides by the channels a head less 2",
        ),
        (
            {"model__rope_scaling": {"type": "dynamic", "factor": 4.0}, "data__sequence_length": 1025},
            "data.sequence_length: 1025 tokens exceed the 1024 that dynamic scaling makes of model.max_position",
        ),
        (
            {"model__num_moe_experts": 2, "model__moe_router_topk": 3},
            "model.moe_router_topk: 3 experts a token of only 2",
        ),
        (
            {"parallel__expert_model_parallel_size": 2},
            "parallel.expert_model_parallel_size: 2 ranks would divide experts, and the model has none",
        ),
        (
            {"data__curriculum": [{"until": 5, "sequence_length": 24}]},
            "data.curriculum.0.sequence_length: 24 tokens do not divide data.sequence_length 64",
        ),
        (
            {
                "data__curriculum": [{"until": 5, "sequence_length": 2}],
                "parallel__context_parallel_size": 2,
            },
            "data.curriculum.0.sequence_length: 2 tokens do not divide .* give a divisor of 64 that is a multiple of 4",
        ),
        (
            {"data__curriculum": [{"until": 5, "sequence_length": 16}, {"until": 5, "sequence_length": 32}]},
            "data.curriculum.1.until: 5 does not come after 5",
        ),
        (
            {"model__num_moe_experts": 2, "model__moe_router_topk": 1},
            "model.moe_router_pre_softmax: the weight of a token's only expert would always be 1",
        ),
        (
            {"model__num_moe_experts": 2, "parallel__tensor_model_parallel_size": 2},
            "parallel.sequence_parallel: tensor-parallel ranks would each send every token to the experts",
        ),
        (
            {
                "model__num_moe_experts": 2,
                "parallel__expert_model_parallel_size": 2,
                "deepspeed__zero_stage": 3,
            },
            "deepspeed.zero_stage: ZeRO 3 divides every weight over all data-parallel ranks",
        ),
        (
            {
                "model__num_moe_experts": 2,
                "parallel__expert_model_parallel_size": 2,
                "deepspeed__offload_optimizer": "cpu",
            },
            "deepspeed.offload_optimizer: DeepSpeed does not take the norm of offloaded experts",
        ),
        (
            {"parallel__expert_model_parallel_size": 4, "model__num_moe_experts": 6},
            "parallel.expert_model_parallel_size: 4 does not divide model.num_moe_experts 6; give a divisor of 6",
        ),
        ({"data__sequence_length": 257}, "data.sequence_length: 257 tokens exceed model.max_position_embeddings 256"),
        ({"training__global_batch_size": 9}, "training.global_batch_size: 9 samples are not a multiple of"),
        (
            {"training__batch_growth": [{"after_tokens": 1, "global_batch_size": 15}]},
            "training.batch_growth.0.global_batch_size: 15 samples are not",
        ),
        (
            {"training__batch_growth": [{"after_tokens": 1, "global_batch_size": 8}]},
            "training.batch_growth.0.global_batch_size: 8 samples do not exceed the 8 before",
        ),
        (
            {"training__batch_growth": [GROWTH[0], GROWTH[1] | {"after_tokens": 10_000}]},
            "training.batch_growth.1.after_tokens: 10,000 does not come after 10,000",
        ),
        ({"schedule__decay": None}, r"schedule.decay: .*give about 10 % of the run \(10 steps\)"),
        ({"faults": {"spike": "rollback"}}, "faults.spike: there are no checkpoints to go back to; give checkpoint"),
        ({"schedule__decay": 91}, "schedule.total: warmup 10 and decay 91 do not fit into 100 steps"),
        ({"schedule__half_life": None}, "schedule.half_life: exponential decay needs its half-life"),
        ({"schedule__decay_shape": "linear"}, "schedule.half_life: 5.* wsd with linear decay has no use for it; set"),
        (
            {"schedule__decay_shape": "lineal"},
            "schedule.decay_shape: unknown decay shape 'lineal'; did you mean linear",
        ),
        ({"schedule__shape": "wds"}, r"schedule.shape: unknown schedule 'wds'; did you mean wsd\?"),
        (
            {"schedule__shape": "xyzzy"},
            "schedule.shape: unknown schedule 'xyzzy'; known are .*wsd",
        ),
        ({"schedule__shape": 3}, "schedule.shape: 3 is refused, it must be text"),
        (
            {"schedule__options": {"budgets": [3]}},
            "schedule.options.budgets; leave it out: schedule.options has no keys here",
        ),
        ({"schedule__options": 3}, "schedule.options: 3 is refused, it must be a mapping"),
        ({"schedule__period": 50}, "schedule.period: 50 .* no use for it; set schedule.period=null"),
        ({"schedule__shape": "cosine"}, "schedule.decay: 20 is given but the schedule cosine has no use for it"),
        ({"schedule": {"shape": "constant", "total": 9, "min_lr_ratio": 0.1}}, "schedule.min_lr_ratio: 0.1 is given"),
        ({"schedule": {"shape": "cosine", "total": 9, "warmup": 10}}, "schedule.total: warmup 10"),
    ],
)
def test_contradictions(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(minimal_fields(**changes))


def test_dynamic_scaling_lets_samples_be_longer() -> None:
    dynamic = {"type": "dynamic", "factor": 4.0}
    recipe = build(minimal_fields(model__rope_scaling=dynamic, data__sequence_length=1024))
    assert recipe.model.longest_sequence == 1024 == 4 * recipe.model.max_position_embeddings


def test_scaling_lies_over_the_presets_key_by_key_and_null_takes_it_away() -> None:
    long = minimal_fields(preset="minicpm-2.4b-128k")
    assert build(long).model.rope_scaling.type == "dynamic"
    long["model"] = {"rope_scaling": {"factor": 2.0}}
    assert build(long).model.longest_sequence == 131_072
    long["model"] = {"rope_scaling": None}
    assert build(long).model.rope_scaling.type == "none"
    long["model"] = {"rope_scaling": {"type": "none"}}
    with pytest.raises(UserError, match="set model.rope_scaling.factor=null"):
        build(long)


def test_a_recipe_cannot_be_changed() -> None:
    recipe = build(minimal_fields())
    with pytest.raises(ValidationError):
        recipe.training.seed = 3


def test_layout_gives_data_parallelism_what_is_left() -> None:
    recipe = build(minimal_fields(parallel__tensor_model_parallel_size=2, training__batch_growth=GROWTH))
    layout = recipe.check_world_size(8)
    assert (layout.world_size, layout.data_parallel_size, layout.tensor_model_parallel_size) == (8, 4, 2)
    assert layout.gradient_accumulation_steps == (1, 2, 4)


@pytest.mark.parametrize(
    ("changes", "world_size", "line"),
    [
        ({"parallel__tensor_model_parallel_size": 2}, 3, "parallel: 3 ranks do not divide into copies .* on 2"),
        ({"parallel__tensor_model_parallel_size": 2}, 0, "parallel: 0 ranks"),
        ({}, 3, "training.global_batch_size: 8 samples do not divide over 3 data-parallel ranks in micro-batches of 2"),
        (
            {"training__batch_growth": [GROWTH[0] | {"global_batch_size": 10}]},
            2,
            "batch_growth.0.global_batch_size: 10",
        ),
        (
            {"parallel__expert_model_parallel_size": 2, "model__num_moe_experts": 4},
            1,
            "parallel.expert_model_parallel_size: 2 does not divide the 1",
        ),
    ],
)
def test_world_sizes_that_do_not_fit(changes: dict[str, Any], world_size: int, line: str) -> None:
    recipe = build(minimal_fields(**changes))
    with pytest.raises(UserError, match=line):
        recipe.check_world_size(world_size)


def test_auto_is_the_largest_micro_batch_that_divides_every_batch() -> None:
    growth = [{"after_tokens": 1024, "global_batch_size": 40}]
    for ranks, most, size in ((1, 8, 8), (1, 100, 8), (4, 8, 2), (8, 8, 1), (2, 3, 2)):
        recipe = build(
            minimal_fields(
                training__global_batch_size=16,
                training__batch_growth=growth,
                training__micro_batch_size="auto",
                training__max_micro_batch_size=most,
            )
        )
        layout = recipe.check_world_size(ranks)
        # the definition, tried size by size
        fitting = [each for each in range(1, most + 1) if 16 % (each * ranks) == 40 % (each * ranks) == 0]
        assert layout.micro_batch_size == max(fitting) == size
        assert layout.gradient_accumulation_steps == (16 // (size * ranks), 40 // (size * ranks))
    with pytest.raises(UserError, match="training.batch_growth.0.global_batch_size: 40 samples .* over 16"):
        recipe.check_world_size(16)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4", "automatic", None])
def test_a_micro_batch_size_is_a_count_or_auto(value: object) -> None:
    with pytest.raises(
        UserError, match=r"^training.micro_batch_size: .* is refused, it must be auto, or a whole number"
    ):
        build(minimal_fields(training__micro_batch_size=value))


def test_a_micro_batch_that_does_not_divide_names_one_that_does() -> None:
    recipe = build(minimal_fields(training__global_batch_size=960, training__micro_batch_size=4))
    with pytest.raises(UserError, match=r"or training.micro_batch_size=3 \(auto takes the largest that divides\)"):
        recipe.check_world_size(64)
