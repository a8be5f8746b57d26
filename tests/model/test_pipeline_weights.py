"""Initial weights of pipeline stages are the whole model's, bit for bit."""

from __future__ import annotations

import hashlib
import os

import pytest
import torch

from tests.distributed.launch import run_on_ranks


def initial_weights(pipeline: int, tensor: int, untied: bool) -> dict[str, str]:
    """Global name of every parameter of this rank -> hash of its bytes."""
    from minicpm_megatron.engine.build import build_model
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters
    from minicpm_megatron.model.sharding import named_shards
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import build

    recipe = build(
        {
            "name": "weights",
            "preset": "minicpm-nano",
            "model": {"num_layers": 4, "untie_embeddings_and_output_weights": untied},
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 8},
            "parallel": {"pipeline_model_parallel_size": pipeline, "tensor_model_parallel_size": tensor},
            "training": {"global_batch_size": 2, "micro_batch_size": 1, "precision": "fp32"},
            "schedule": {"shape": "constant", "total": 1},
        }
    )
    groups.initialize(
        recipe.check_world_size(pipeline * tensor), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}"
    )
    config = MiniCPMConfig.from_recipe(recipe.model, recipe.parallel)
    model = build_model(config, recipe)
    initialize_parameters(model, config, seed=7)
    return {
        name: hashlib.sha256(parameter.detach().cpu().numpy().tobytes()).hexdigest()
        for name, parameter, _ in named_shards(model, config)
    }


EMBEDDING = "embedding.word_embeddings.weight"


@pytest.mark.parametrize("untied", [True, False])
def test_two_stages_hold_the_weights_of_one(untied):
    target = "tests.model.test_pipeline_weights:initial_weights"
    (whole,) = run_on_ranks(target, 1, pipeline=1, tensor=1, untied=untied)
    first, last = run_on_ranks(target, 2, pipeline=2, tensor=1, untied=untied)
    assert {**first, **last} == whole
    assert set(first) & set(last) == (set() if untied else {EMBEDDING})
    assert "decoder.layers.3.mlp.linear_fc1.weight" in last


def test_tensor_parallel_stages_hold_the_shards_of_tensor_parallel_ranks():
    target = "tests.model.test_pipeline_weights:initial_weights"
    shards = run_on_ranks(target, 2, pipeline=1, tensor=2, untied=False)
    stages = run_on_ranks(target, 4, pipeline=2, tensor=2, untied=False)
    for rank, shard in enumerate(shards):
        assert {**stages[rank], **stages[2 + rank]} == shard


def test_the_copy_that_megatrons_own_last_stage_keeps_of_a_tied_embedding_is_the_embedding():
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.sharding import global_name
    from minicpm_megatron.recipe import get_preset

    config = MiniCPMConfig.from_recipe(get_preset("minicpm-nano"))
    stage = torch.nn.Module()
    stage.output_layer = torch.nn.Module()
    assert global_name(stage, config, "output_layer.weight") == EMBEDDING
    config.untie_embeddings_and_output_weights = True
    assert global_name(stage, config, "output_layer.weight") == "output_layer.weight"
