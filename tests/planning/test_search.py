"""Which layouts are found, and in which order."""

from __future__ import annotations

import itertools
from functools import cache

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.planning import Cluster, Plan, find_layouts, predict
from minicpm_megatron.planning.report import overrides
from minicpm_megatron.planning.search import balanced_layers
from minicpm_megatron.recipe import ModelRecipe, Recipe, build, get_preset
from minicpm_megatron.recipe.flops import flops_per_token, head_flops_per_token
from minicpm_megatron.recipe.load import apply_override
from tests.planning.tiny import GPU, recipe
from tests.recipe.fields import minimal_fields


def of_preset(preset: str, samples: int, length: int = 4096, **changes: object) -> Recipe:
    training = {"global_batch_size": samples, "micro_batch_size": 1}
    return build(minimal_fields(preset=preset, data__sequence_length=length, training=training, **changes))


@cache
def plan(preset: str, gpus: int, samples: int, gpu: str = "h100") -> Plan:
    return find_layouts(of_preset(preset, samples), Cluster.of(gpu, gpus, 8))


@pytest.mark.parametrize(
    ("preset", "gpus"), [("minicpm-1.2b", 24), ("minicpm-2.4b", 24), ("minicpm-2.4b", 16), ("minicpm-moe-8x2b", 64)]
)
def test_only_what_divides_is_listed(preset: str, gpus: int) -> None:
    found, model = plan(preset, gpus, 960), get_preset(preset)
    assert found.layouts
    for each in found.layouts:
        layout = each.layout
        tp, ep = layout.tensor_model_parallel_size, layout.expert_model_parallel_size
        assert model.num_attention_heads % tp == model.num_query_groups % tp == model.ffn_hidden_size % tp == 0
        assert (model.num_moe_experts or 1) % ep == 0
        assert layout.data_parallel_size * layout.context_parallel_size % ep == 0
        model_parallel = tp * layout.pipeline_model_parallel_size * layout.context_parallel_size
        assert model_parallel * layout.data_parallel_size == gpus
        micro = each.recipe.training.micro_batch_size
        assert micro * each.micro_batches * layout.data_parallel_size == 960
        assert each.memory.total <= 0.9 * 80e9


def test_fastest_first_and_each_layout_once() -> None:
    layouts = plan("minicpm-2.4b", 16, 960).layouts
    speeds = [each.tokens_per_second for each in layouts]
    assert speeds == pytest.approx(sorted(speeds, reverse=True))
    sizes = [
        (each.layout.tensor_model_parallel_size, each.layout.pipeline_model_parallel_size)
        + (each.layout.context_parallel_size,)
        for each in layouts
    ]
    assert len(set(sizes)) == len(sizes)


def test_what_does_not_fit_is_counted() -> None:
    one = of_preset("minicpm-2.4b", 64)
    large, small = (find_layouts(one, Cluster.of(gpu, 2, 8), zero_stages=[1]) for gpu in ("h200", "a100-40"))
    assert large.do_not_fit == 0 < small.do_not_fit
    assert len(small.layouts) + small.do_not_fit == len(large.layouts)


def test_tensor_parallelism_stays_within_a_node() -> None:
    model = {"num_attention_heads": 32, "num_query_groups": 32, "hidden_size": 2048, "ffn_hidden_size": 5120}
    layouts = find_layouts(of_preset("minicpm-2.4b", 512, model=model), Cluster.of("h100", 32, 8)).layouts
    rank = {
        each.layout.tensor_model_parallel_size: place
        for place, each in enumerate(layouts)
        if each.layout.data_parallel_size * each.layout.tensor_model_parallel_size == 32
    }
    assert rank[1] < rank[2] < rank[4] < rank[8] < rank[16]
    one = recipe(parallel={"tensor_model_parallel_size": 4, "sequence_parallel": True}, model={"num_query_groups": 4})
    near, far = (predict(one, Cluster(GPU, 4, per_node)).step_seconds for per_node in (4, 2))
    assert near < far


def test_a_found_layout_is_what_its_overrides_say() -> None:
    one = of_preset("minicpm-2.4b", 960)
    for each in plan("minicpm-2.4b", 16, 960).layouts[:8]:
        fields = one.model_dump(mode="json")
        for override in overrides(each):
            apply_override(fields, override)
        assert build(fields) == each.recipe
        assert predict(build(fields), Cluster.of("h100", 16, 8)) == each


@pytest.mark.parametrize("stages", [2, 3, 4, 5])
def test_no_other_cut_of_the_layers_is_faster(stages: int) -> None:
    model = ModelRecipe(**get_preset("minicpm-2.4b").model_dump() | {"num_layers": 11})
    head = head_flops_per_token(model)
    layer = (flops_per_token(model, 4096) - head) / 11

    def slowest(layers: tuple[int, ...]) -> float:
        return max(*(count * layer for count in layers[:-1]), layers[-1] * layer + head)

    cuts = [cut for cut in itertools.product(range(1, 11), repeat=stages) if sum(cut) == 11]
    assert slowest(balanced_layers(model, stages, 4096)) == min(map(slowest, cuts))
    assert sum(balanced_layers(model, stages, 4096)) == 11


def test_recompute_and_zero_stage_can_be_fixed() -> None:
    fixed = find_layouts(recipe(), Cluster(GPU, 4, 8), recompute=["selective"], zero_stages=[0])
    settings = {(each.recipe.training.recompute, each.recipe.deepspeed.zero_stage) for each in fixed.layouts}
    assert settings == {("selective", 0)}
    assert {each.layout.pipeline_model_parallel_size for each in fixed.layouts} == {1}, "bf16 pipelines need ZeRO 1"


@pytest.mark.parametrize(
    ("samples", "gpus", "message"),
    [(7, 41, "no layout on 41 GPUs is legal for 7 samples"), (64, 1, "none of 1 layouts fits: the smallest needs")],
)
def test_why_nothing_is_found(samples: int, gpus: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        find_layouts(of_preset("minicpm-moe-8x2b", samples), Cluster.of("h100", gpus, gpus))
