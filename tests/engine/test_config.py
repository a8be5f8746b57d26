"""The DeepSpeed JSON of a run: resolved, and a user's file over it accepted or refused by name."""

from __future__ import annotations

import json

import pytest

from minicpm_megatron.engine.config import deepspeed_config
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import build
from minicpm_megatron.recipe.memory import reduce_bucket_size


def recipe(config=None, **training):
    return build(
        {
            "name": "x",
            "preset": "minicpm-nano",
            "data": {"train": [{"prefix": "x"}], "sequence_length": 32},
            "training": {"global_batch_size": 16, "micro_batch_size": 2, "precision": "bf16"} | training,
            "schedule": {"total": 10, "decay": 0, "decay_shape": "linear"},
            "deepspeed": {"zero_stage": 2, "config": config},
        }
    )


def resolve(tmp_path, content):
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    run = recipe(str(path))
    return deepspeed_config(run, run.check_world_size(2))


def test_everything_is_resolved():
    run = recipe()
    config = deepspeed_config(run, run.check_world_size(2))
    assert config["train_batch_size"] == 16 == 2 * config["gradient_accumulation_steps"] * 2
    assert config["bf16"] == {"enabled": True} and config["zero_optimization"]["stage"] == 2
    assert config["data_types"] == {"grad_accum_dtype": "fp32"} and config["communication_data_type"] == "fp32"
    assert "auto" not in json.dumps(config) and "scheduler" not in config and "optimizer" not in config


def test_a_users_file_is_laid_over_ours(tmp_path):
    theirs = {
        "train_batch_size": "auto",
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": "auto", "reduce_bucket_size": 1000},
        "wall_clock_breakdown": True,
    }
    config = resolve(tmp_path, theirs)
    assert config["zero_optimization"] == {"stage": 2, "overlap_comm": False, "reduce_bucket_size": 1000}
    assert config["wall_clock_breakdown"] is True and config["train_batch_size"] == 16


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        ({"train_batch_size": 32}, "train_batch_size is 32, but training.global_batch_size of the recipe makes it 16"),
        ({"communication_data_type": "bf16"}, "communication_data_type is 'bf16', but training.precision"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but training.gradient_clipping"),
        ({"zero_optimization": {"stage": 3}}, "zero_optimization.stage is 3, but deepspeed.zero_stage"),
        ({"fp16": {"enabled": True}}, "fp16.enabled is True, but training.precision"),
        ({"bf16": {"enabled": False}}, "bf16.enabled is False, but training.precision"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, "device is 'cpu', but deepspeed.offload_param"),
        ({"zero_optimization": {"offload_optimizer": {"ratio": 0.5}}}, "ratio divides the optimizer's state"),
        ({"zero_optimization": {"zenflow": {"topk_ratio": 0.1}}}, "zenflow.topk_ratio divides the optimizer's state"),
        ({"zero_optimization": {"round_robin_gradients": True}}, "round_robin_gradients mixes up which weights"),
        ({"scheduler": {"type": "WarmupLR"}}, "a 'scheduler' block is not accepted"),
        ({"optimizer": {"type": "AdamW"}}, "a 'optimizer' block is not accepted"),
        ({"activation_checkpointing": {"partition_activations": "auto"}}, 'is "auto", for which there is no value'),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ("[1]", "not an object"),
        ("{", "not valid JSON"),
    ],
)
def test_contradictions_are_refused_by_name(tmp_path, theirs, message):
    with pytest.raises(UserError, match="ds.json") as refusal:
        resolve(tmp_path, theirs)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.cpu_only("a GPU has these kernels")
def test_zero_plus_plus_is_passed_through_but_for_what_needs_cuda(tmp_path):
    config = resolve(tmp_path, {"zero_optimization": {"zero_hpz_partition_size": 2, "zero_quantized_weights": False}})
    assert config["zero_optimization"]["zero_hpz_partition_size"] == 2
    with pytest.raises(UserError, match="zero_quantized_gradients has kernels for CUDA only"):
        resolve(tmp_path, {"zero_optimization": {"zero_quantized_gradients": True}})


def test_a_missing_file_is_named():
    run = recipe("nowhere.json")
    with pytest.raises(UserError, match="nowhere.json: cannot read the DeepSpeed JSON"):
        deepspeed_config(run, run.check_world_size(2))


def test_deepspeed_is_given_the_bucket_that_the_estimate_counts():
    run = recipe()
    layout = run.check_world_size(2)
    assert deepspeed_config(run, layout)["zero_optimization"]["reduce_bucket_size"] == reduce_bucket_size(run, layout)
