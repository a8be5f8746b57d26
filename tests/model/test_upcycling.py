"""The real model before and after upcycling: equal logits, and what becomes of them without renormalised weights."""

from __future__ import annotations

import os

import pytest
import torch

from tests.convert.conftest import VOCABULARY, random_tensors, small_model
from tests.device import put
from tests.distributed.launch import run_on_ranks

CASES: dict[str, dict[str, object]] = {
    "8 experts": {},
    "all experts": {"experts": 3, "top_k": 3},
    "4 slices": {"granularity": 4},
    "3 slices": {"granularity": 3, "router_std": 1.0},
    "noise": {"noise": 1e-3},
    "not renormalised": {"pre_softmax": True},
}


def differences() -> dict[str, float]:
    """Largest |logit of the mixture - logit of the dense model| over the largest logit."""
    import minicpm_megatron as library
    from minicpm_megatron.methods.upcycling import Upcycling, upcycled_model
    from minicpm_megatron.model.sharding import named_shards
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout, ModelRecipe

    groups.initialize(Layout(1, 1, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")
    tokens = put(torch.randint(VOCABULARY, (2, 40), generator=torch.Generator().manual_seed(1)))

    def logits(shape: ModelRecipe, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        config = library.MiniCPMConfig.from_recipe(shape)
        model = library.MiniCPMModel(config).eval()
        with torch.no_grad():
            for name, parameter, spec in named_shards(model, config):
                parameter.copy_(spec.take(tensors.pop(name), tuple(parameter.shape)))
            assert not tensors
            return model(tokens, None, None)[..., : shape.vocab_size]

    dense = small_model()
    expected = logits(dense, random_tensors(dense))
    found = {}
    for name, case in CASES.items():
        options = {"experts": 8, **case}
        top_k, pre_softmax = options.pop("top_k", 2), options.pop("pre_softmax", False)
        tensors = library.upcycle_state_dict(random_tensors(dense), **options)
        plan = Upcycling(options["experts"], top_k, granularity=options.get("granularity", 1))
        shape = upcycled_model(dense, plan).model_copy(update={"moe_router_pre_softmax": pre_softmax})
        found[name] = float((logits(shape, tensors) - expected).abs().max() / expected.abs().max())
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, float]:
    return run_on_ranks("tests.model.test_upcycling:differences", 1)[0]


@pytest.mark.parametrize("name", ["8 experts", "all experts", "4 slices", "3 slices"])
def test_the_mixture_has_the_logits_of_the_dense_model(name: str, found: dict[str, float]) -> None:
    # the sum over experts rounds once more than the MLP did; measured 3e-7
    assert found[name] < 5e-6


def test_noise_and_unnormalised_weights_do_not(found: dict[str, float]) -> None:
    assert 1e-5 < found["noise"] < 0.05
    # two of eight nearly equal probabilities sum to about a quarter: an MLP adds a quarter of what it did
    assert found["not renormalised"] > 0.1
