"""Initial weights of pipeline stages are the whole model's, bit for bit."""

from __future__ import annotations

import hashlib
import os

import torch

from tests.distributed.launch import run_on_ranks


def initial_weights(pipeline: int, tensor: int, untied: bool) -> dict[str, str]:
    """Global name of every parameter of this rank -> hash of its bytes."""
    from megatron.core import parallel_state

    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters
    from minicpm_megatron.model.model import MiniCPMModel
    from minicpm_megatron.model.sharding import named_shards
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout, ParallelRecipe, get_preset

    groups.initialize(
        Layout(pipeline * tensor, tensor, pipeline, 1, 1, 1, (1,)),
        init_method=f"file://{os.environ['MINICPM_TEST_STORE']}",
    )
    shape = get_preset("minicpm-nano").model_copy(
        update={"num_layers": 4, "untie_embeddings_and_output_weights": untied}
    )
    sizes = ParallelRecipe(tensor_model_parallel_size=tensor, pipeline_model_parallel_size=pipeline)
    config = MiniCPMConfig.from_recipe(shape, sizes)
    model = MiniCPMModel(
        config,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
    )
    initialize_parameters(model, config, seed=7)
    return {
        name: hashlib.sha256(parameter.detach().numpy().tobytes()).hexdigest()
        for name, parameter, _ in named_shards(model, config)
    }


def test_two_stages_hold_the_weights_of_one():
    """Untied: where the embedding is tied, Megatron-Core's pipeline stages need CUDA to exchange it."""
    target = "tests.model.test_pipeline_weights:initial_weights"
    (whole,) = run_on_ranks(target, 1, pipeline=1, tensor=1, untied=True)
    first, last = run_on_ranks(target, 2, pipeline=2, tensor=1, untied=True)
    assert {**first, **last} == whole
    assert not set(first) & set(last)
    assert "decoder.layers.3.mlp.linear_fc1.weight" in last


def test_the_last_stages_copy_of_a_tied_embedding_is_the_embedding():
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.sharding import global_name
    from minicpm_megatron.recipe import get_preset

    config = MiniCPMConfig.from_recipe(get_preset("minicpm-nano"))
    stage = torch.nn.Module()
    assert global_name(stage, config, "output_layer.weight") == "embedding.word_embeddings.weight"
    config.untie_embeddings_and_output_weights = True
    assert global_name(stage, config, "output_layer.weight") == "output_layer.weight"
