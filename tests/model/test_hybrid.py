"""MiniCPM as a HybridModel is MiniCPMModel in every bit, and its checkpoints are MiniCPMModel's."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.hybrid_names import gpt_name, hybrid_name
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.storage.sharded import WEIGHT, CheckpointReader, Fragment, rank_file, write_fragments
from tests.convert.conftest import EXPERTS, random_tensors, small_model
from tests.distributed.launch import run_on_ranks
from tests.storage.layouts import state

SHAPES: dict[str, dict[str, Any]] = {
    "tied": {"dim_model_base": 48},
    "untied": {"untie_embeddings_and_output_weights": True},
    "experts": {**EXPERTS, "num_moe_experts": 4},
}


def _start(tensor: int, pipeline: int = 1) -> None:
    from megatron.core import parallel_state

    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout

    if parallel_state.model_parallel_is_initialized():
        parallel_state.destroy_model_parallel()
    layout = Layout(2, tensor, pipeline, 1, 1, 2 // (tensor * pipeline), (1,))
    groups.initialize(layout, init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")


def _gradients(model: torch.nn.Module, config: Any) -> dict[str, torch.Tensor]:
    from minicpm_megatron.model.sharding import named_shards

    return {name: parameter.grad for name, parameter, _ in named_shards(model, config) if parameter.grad is not None}


def through_a_checkpoint(source: torch.nn.Module, target: torch.nn.Module, config: Any) -> None:
    """Save one form's weights as a run saves them, and load the files into the other, whose weights are zeroed."""
    from minicpm_megatron.model.sharding import named_shards

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pieces = [Fragment(spec, WEIGHT, 0, each.detach().view(-1)) for _, each, spec in named_shards(source, config)]
        write_manifest(folder, [write_fragments(folder / rank_file(0), pieces, {})], state=state(1), facts={})
        reader = CheckpointReader(folder)
        for _, parameter, spec in named_shards(target, config):
            parameter.data.zero_()
            parameter.data.copy_(reader.read_shard(spec, WEIGHT, tuple(parameter.shape)))


def compare() -> dict[str, list[bool]]:
    """Compare logits, losses (fused, and from logits), gradients and state dicts of both forms."""
    import minicpm_megatron as library
    from minicpm_megatron.recipe import ParallelRecipe

    found = {}
    rows = torch.randint(400, (2, 25), generator=torch.Generator().manual_seed(4))
    tokens, labels = rows[:, :-1], rows[:, 1:]
    starts = torch.where(torch.arange(24) >= 9, 9, 0).expand(2, 24)
    for tensor in (1, 2):
        _start(tensor)
        for name, changes in SHAPES.items():
            shape = small_model(**changes)
            sizes = ParallelRecipe(tensor_model_parallel_size=tensor, sequence_parallel=tensor > 1)
            config = library.MiniCPMConfig.from_recipe(shape, sizes)
            forms = [library.MiniCPMModel(config), library.MiniCPMHybridModel(config)]
            for model in forms:
                library.initialize_parameters(model, config, seed=6)
            losses = [model(tokens, attention_mask=starts, labels=labels) for model in forms]
            for loss in losses:
                loss.mean().backward()
            gradients = [_gradients(model, config) for model in forms]
            logits = [model(tokens) for model in forms]
            gpt, hybrid = forms
            renamed = {hybrid_name(key): value for key, value in gpt.state_dict().items()}
            back = {gpt_name(key): value for key, value in hybrid.state_dict().items()}
            for parameter in hybrid.parameters():
                parameter.data.zero_()
            hybrid.load_state_dict(renamed)
            if tensor == 1:  # a checkpoint's tensors are whole ones
                through_a_checkpoint(gpt, hybrid, config)
                through_a_checkpoint(hybrid, gpt, config)
            for model in forms:
                model.config.fused_loss = False
            found[f"TP{tensor} {name}"] = [
                torch.equal(*logits),
                torch.equal(*losses),
                gradients[0].keys() == gradients[1].keys(),
                all(torch.equal(gradient, gradients[1][key]) for key, gradient in gradients[0].items()),
                back.keys() == gpt.state_dict().keys(),
                all(torch.equal(model(tokens), logits[0]) for model in forms),
                torch.equal(gpt(tokens, labels=labels), hybrid(tokens, labels=labels)),
                config.num_layers == shape.num_layers and hybrid.config.num_layers == 2 * shape.num_layers,
            ]
    return found


def stages() -> dict[str, list[str]]:
    """Parameters of each pipeline stage that differ from the whole model's, wherever stages end."""
    import minicpm_megatron as library
    from minicpm_megatron.model.sharding import named_shards
    from minicpm_megatron.recipe import ParallelRecipe

    _start(1)
    # untied: Megatron-Core 0.19 moves a tied embedding's copy to a CUDA device
    shape = small_model(num_layers=3, untie_embeddings_and_output_weights=True)
    config = library.MiniCPMConfig.from_recipe(shape)
    whole = library.MiniCPMModel(config)
    library.initialize_parameters(whole, config, seed=6)
    wanted = {name: parameter.detach() for name, parameter, _ in named_shards(whole, config)}
    _start(1, pipeline=2)
    config = library.MiniCPMConfig.from_recipe(shape, ParallelRecipe(pipeline_model_parallel_size=2))
    first = int(os.environ["RANK"]) == 0
    found = {}
    # six blocks: three on each stage, so that the second transformer layer is on both; or told by `|`
    for pattern, attention in ((None, (2, 1)), ("*-|*-*-", (1, 2))):
        stage = library.MiniCPMHybridModel(config, pattern, pre_process=first, post_process=not first)
        library.initialize_parameters(stage, config, seed=6)
        mine = dict((name, parameter) for name, parameter, _ in named_shards(stage, config))
        found[str(pattern)] = [name for name, parameter in mine.items() if not torch.equal(parameter, wanted[name])]
        queries = [name for name in mine if "linear_qkv" in name]
        assert len(queries) == attention[0 if first else 1], queries
    return found


def refusals() -> list[str]:
    """Messages on patterns that are not MiniCPM's, and on a scaled rotary base in a plain HybridModel."""
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    import minicpm_megatron as library
    from minicpm_megatron.model.hybrid import hybrid_config, hybrid_pattern
    from minicpm_megatron.recipe import ParallelRecipe, RopeScaling

    _start(1)
    config = library.MiniCPMConfig.from_recipe(small_model())
    assert hybrid_pattern(config) == hybrid_pattern(hybrid_config(config)) == "*-" * 6
    staged = library.MiniCPMConfig.from_recipe(small_model(), ParallelRecipe(pipeline_model_parallel_size=4))
    assert hybrid_pattern(staged) == "*-*|-*-|*-*|-*-"
    said = []
    for pattern in ("-*" * 6, "*E" * 6, "**--" * 3):
        try:
            library.MiniCPMHybridModel(config, pattern)
        except UserError as error:
            said.append(str(error))
    scaled = library.MiniCPMConfig.from_recipe(small_model(rope_scaling=RopeScaling(type="ntk", factor=2.0)))
    library.MiniCPMHybridModel(scaled)
    for told in (config, hybrid_config(scaled)):
        try:
            HybridModel(told, library.get_minicpm_hybrid_stack_spec(told), 512, 128, hybrid_layer_pattern="*-" * 6)
        except UserError as error:
            said.append(str(error))
    return said


def everything() -> dict[str, Any]:
    """All of the above on one start."""
    return {"compare": compare(), "stages": stages(), "refusals": refusals()}


@pytest.fixture(scope="module")
def found():
    return run_on_ranks("tests.model.test_hybrid:everything", 2)


def test_both_forms_are_equal_in_every_bit(found):
    for rank in found:
        assert len(rank["compare"]) == 6
        for name, equal in rank["compare"].items():
            assert equal == [True] * 8, name


def test_stages_hold_the_weights_of_the_whole_model(found):
    for rank in found:
        assert rank["stages"] == {"None": [], "*-|*-*-": []}


def test_what_is_no_minicpm_is_refused(found):
    *patterns, not_hybrid, scaled = found[0]["refusals"]
    assert len(patterns) == 3 and all("repeat *- once for each transformer layer" in said for said in patterns)
    assert "leave is_hybrid_model on" in not_hybrid
    assert "rope scaling of type ntk" in scaled


@pytest.mark.parametrize("changes", [{}, EXPERTS], ids=["dense", "experts"])
def test_names_map_both_ways(changes):
    names = list(random_tensors(small_model(**changes)))
    hybrid = [hybrid_name(name) for name in names]
    assert len(set(hybrid)) == len(names) and [gpt_name(name) for name in hybrid] == names
    assert hybrid_name("decoder.layers.2.self_attention.linear_qkv.weight").startswith("decoder.layers.4.self_")
    assert hybrid_name("decoder.final_layernorm.weight") == "decoder.final_norm.weight"


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("decoder.layers.1.self_attention.linear_qkv.weight", gpt_name),  # an MLP's place
        ("decoder.layers.2.mlp.linear_fc1.weight", gpt_name),  # attention's place
        ("decoder.layers.2.mixer.in_proj.weight", gpt_name),
        ("decoder.layers.x.mlp.linear_fc1.weight", hybrid_name),
    ],
)
def test_a_name_of_another_model_is_refused(name, rename):
    with pytest.raises(UserError, match="parameter names"):
        rename(name)
