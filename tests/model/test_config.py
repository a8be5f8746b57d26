"""MiniCPMConfig from a recipe, from a preset and by hand."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minicpm_megatron import MiniCPMConfig, load_recipe, presets
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ParallelRecipe
from tests.project.test_docs import ROOT

QUICKSTART = ROOT / "examples" / "recipes" / "quickstart.yaml"


def values(config: MiniCPMConfig) -> dict[str, object]:
    """Fields that can be compared: functions that draw weights are new ones in every config."""
    return {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(config)
        if not field.name.endswith("init_method")
    }


def test_a_recipe_gives_its_layout_and_precision() -> None:
    layout = ["parallel.tensor_model_parallel_size=2", "training.precision=bf16", "training.recompute=selective"]
    recipe = load_recipe(QUICKSTART, [*layout, "training.fused_loss=false", "training.deterministic=true"])
    by_parts = MiniCPMConfig.from_recipe(
        recipe.model,
        recipe.parallel,
        precision="bf16",
        recompute="selective",
        fused_loss=False,
        deterministic_mode=True,
    )
    whole = MiniCPMConfig.from_recipe(recipe)
    assert values(whole) == values(by_parts)
    assert (whole.tensor_model_parallel_size, whole.params_dtype, whole.fused_loss) == (2, torch.bfloat16, False)
    given = MiniCPMConfig.from_recipe(recipe, ParallelRecipe(), precision="fp32", recompute="none", fused_loss=True)
    assert (given.tensor_model_parallel_size, given.params_dtype, given.fused_loss) == (1, torch.float32, True)


def test_what_is_no_recipe_is_refused() -> None:
    for wrong in (QUICKSTART, "minicpm-2.4b", {"num_layers": 2}):
        with pytest.raises(UserError, match="is no recipe; give load_recipe.path., or a preset"):
            MiniCPMConfig.from_recipe(wrong)  # type: ignore[arg-type]


def test_a_config_by_hand_is_the_presets() -> None:
    model = presets["minicpm-nano"]
    by_hand = MiniCPMConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_query_groups,
        vocab_size=model.vocab_size,
        max_position_embeddings=model.max_position_embeddings,
    )
    expected = values(MiniCPMConfig.from_recipe(model))
    assert {name: value for name, value in values(by_hand).items() if value != expected[name]} == {
        # Megatron-Core asks for them where there are pipeline stages, and takes None for "p2p"
        "pipeline_dtype": None,
        "cp_comm_type": None,
    }


def test_a_config_without_a_vocabulary_says_so() -> None:
    config = MiniCPMConfig(num_layers=2, hidden_size=64, num_attention_heads=4)
    with pytest.raises(UserError, match="MiniCPMConfig.vocab_size: is missing; give the tokenizer's number of pieces"):
        config.padded_vocab_size()
