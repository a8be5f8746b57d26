"""Losses of logits that every tensor-parallel rank holds whole: the same losses and gradients as from its own part."""

from __future__ import annotations

import os
from typing import Any

from tests.convert.conftest import small_model
from tests.device import put
from tests.distributed.launch import run_on_ranks

WAYS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "built so": ({"parallel_output": False}, {}),
    "asked for": ({}, {"runtime_gather_output": True}),
}


def compared() -> dict[str, float]:
    """Largest relative differences of losses and of each gradient to the fused loss, which gathers nothing."""
    import torch

    import minicpm_megatron as library
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout, ParallelRecipe

    groups.initialize(Layout(2, 2, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")
    shape = small_model(vocab_size=400, untie_embeddings_and_output_weights=True)
    tokens = put(torch.randint(400, (2, 17), generator=torch.Generator().manual_seed(5)))
    runs: dict[str, dict[str, Any]] = {}
    models = {"GPTModel": library.MiniCPMModel, "HybridModel": library.MiniCPMHybridModel}
    for kind, constructor in models.items():
        for way, (built, called) in {"": ({}, {}), **WAYS}.items():
            sizes = ParallelRecipe(tensor_model_parallel_size=2)
            config = library.MiniCPMConfig.from_recipe(shape, sizes, fused_loss=not way)
            model = constructor(config, **built)
            library.initialize_parameters(model, config, seed=2)
            losses = model(tokens[:, :-1], labels=tokens[:, 1:], **called)
            losses.mean().backward()
            gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
            runs[f"{kind} {way}"] = {"losses": losses.detach(), **gradients}
    found = {}
    for kind in models:
        for way in WAYS:
            for name, expected in runs[f"{kind} "].items():
                difference = (runs[f"{kind} {way}"][name] - expected).abs().max() / expected.abs().max()
                found[f"{kind} {way}: {name}"] = float(difference)
    return found


def test_a_loss_of_gathered_logits_is_the_loss_of_their_parts() -> None:
    for rank in run_on_ranks("tests.model.test_gathered_logits:compared", 2):
        assert len(rank) > 40
        assert max(rank.values()) < 1e-5, {name: value for name, value in rank.items() if value >= 1e-5}
