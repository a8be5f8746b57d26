"""The z-loss against its formula on gathered logits, fused and from whole logits, over two tensor-parallel ranks."""

from __future__ import annotations

import os
from typing import Any

import pytest

from minicpm_megatron import MiniCPMConfig, get_minicpm_layer_spec, load_recipe
from minicpm_megatron.errors import UserError
from tests.convert.conftest import small_model
from tests.device import put
from tests.distributed.launch import run_on_ranks
from tests.project.test_docs import ROOT

COEFFICIENT = 0.01  # a hundred times the usual one, so that it shows


def compared() -> dict[str, float]:
    """Largest differences, relative: of losses in training and evaluation to the formula, and of gradients."""
    import torch
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    import minicpm_megatron as library
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout, ParallelRecipe

    groups.initialize(Layout(2, 2, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")
    shape = small_model(vocab_size=400, num_layers=2)
    rows = put(torch.randint(400, (2, 17), generator=torch.Generator().manual_seed(5)))
    tokens, labels = rows[:, :-1], rows[:, 1:]
    gradients: dict[str, dict[str, Any]] = {}
    found = {}
    for name, fused in (("fused", True), ("whole", False), ("formula", False)):
        config = library.MiniCPMConfig.from_recipe(
            shape,
            ParallelRecipe(tensor_model_parallel_size=2, sequence_parallel=True),
            fused_loss=fused,
            z_loss_coeff=COEFFICIENT,
        )
        model = library.MiniCPMModel(config)
        library.initialize_parameters(model, config, seed=2)
        logits = gather_from_tensor_model_parallel_region(model(tokens)).float()[..., :400]
        plain = torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
        formula = plain + COEFFICIENT * logits.logsumexp(-1).square()
        losses = formula if name == "formula" else model(tokens, labels=labels)
        losses.mean().backward()
        gradients[name] = {key: parameter.grad for key, parameter in model.named_parameters()}
        model.eval()
        with torch.no_grad():
            evaluated = model(tokens, labels=labels)
        for when, got, expected in (("training", losses, formula), ("evaluation", evaluated, plain)):
            found[f"{name}, {when}"] = float(((got - expected).abs().max() / expected.abs().max()).detach())
    for name in ("fused", "whole"):
        for key, expected in gradients["formula"].items():
            difference = (gradients[name][key] - expected).abs().max() / expected.abs().max()
            found[f"{name}, {key}"] = float(difference)
    return found


def test_the_z_loss_is_its_formula() -> None:
    for rank in run_on_ranks("tests.model.test_z_loss:compared", 2):
        assert len(rank) > 20
        assert max(rank.values()) < 1e-5, {name: value for name, value in rank.items() if value >= 1e-5}


def test_the_recipes_key_reaches_the_model() -> None:
    recipe = load_recipe(ROOT / "examples" / "recipes" / "quickstart.yaml", ["training.z_loss_coeff=1e-4"])
    config = MiniCPMConfig.from_recipe(recipe)
    assert config.z_loss_coeff == 1e-4
    with pytest.raises(UserError, match="GPTModel and HybridModel know no z-loss; build MiniCPMModel"):
        get_minicpm_layer_spec(config)
