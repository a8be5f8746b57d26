"""A model and machines small enough to work every formula out by hand."""

from __future__ import annotations

from typing import Any

from minicpm_megatron.planning.cluster import Cluster, Gpu
from minicpm_megatron.planning.communication import Work
from minicpm_megatron.recipe import Recipe, build
from minicpm_megatron.recipe.memory import pipeline_stages
from tests.recipe.fields import minimal_fields

# 4 layers of 4 query heads and 2 groups of 2 channels: a layer has 192 parameters in attention, 384 in the MLP, 16 in
# norms; the model 4 x 592 + 8 + 32 x 8 = 2,632
MODEL = {
    "num_layers": 4,
    "hidden_size": 8,
    "ffn_hidden_size": 16,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "kv_channels": 2,
    "vocab_size": 32,
}
PARAMETERS = 2632
# reached are 0.6e12 FLOP/s, 0.8e9 bytes/s of memory, 0.8e8 within a node and 0.8e7 between nodes
GPU = Gpu(flops=1e12, memory=1e9, memory_bandwidth=1e9, nvlink=1e8, network=1e7)


def recipe(**changes: Any) -> Recipe:
    """16 tokens a sample, so that one hidden state of one is 16 x 8 x 2 = 256 bytes; 8 samples a step."""
    fields = {
        "preset": None,
        "model": MODEL,
        "data__sequence_length": 16,
        "training": {"global_batch_size": 8, "micro_batch_size": 1},
        "deepspeed__zero_stage": 1,
    }
    model = MODEL | changes.pop("model", {})
    training = fields["training"] | changes.pop("training", {})
    return build(minimal_fields(**(fields | changes | {"model": model, "training": training})))


def work(gpus: int, stage: int = 0, **changes: Any) -> Work:
    """One pipeline stage of the recipe on so many GPUs of one node."""
    one = recipe(**changes)
    layout = one.check_world_size(gpus)
    return Work(one, layout, Cluster(GPU, gpus, 8), pipeline_stages(one, layout)[stage])
