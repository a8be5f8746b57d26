"""The layer of experts against plain torch, and its load-balancing loss against transformers'."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.convert.conftest import small_model
from tests.device import device, put
from tests.distributed.launch import run_on_ranks

EXPERTS, BATCH, LENGTH = 8, 3, 40
CASES: dict[str, dict[str, Any]] = {
    "by sequence": {},
    "by micro-batch": {"moe_router_load_balancing_type": "aux_loss"},
    "3 of 8 narrow ones, z-loss": {"moe_z_loss_coeff": 3.0, "moe_router_topk": 3, "moe_ffn_hidden_size": 120},
    "not renormalised": {"moe_router_pre_softmax": True},
    "1 of 8": {"moe_router_pre_softmax": True, "moe_router_topk": 1},
}


def _start() -> None:
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout

    groups.initialize(Layout(1, 1, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")


def _layer(**changes: Any) -> Any:
    from minicpm_megatron import MiniCPMConfig, MiniCPMModel, initialize_parameters

    config = MiniCPMConfig.from_recipe(
        small_model(num_layers=1, num_moe_experts=EXPERTS, moe_aux_loss_coeff=5.0, **changes)
    )
    model = MiniCPMModel(config)
    initialize_parameters(model, config, seed=4)
    return model.decoder.layers[0].mlp


def _input(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    # larger in one direction, so that the experts' load is uneven
    states = torch.randn(LENGTH, BATCH, 96, generator=generator) + torch.randn(96, generator=generator)
    return put(states.to(dtype)).requires_grad_()


def plain(layer: Any, states: torch.Tensor, topk: int, renormalise: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Output [s, b, h] and router logits [s, b, experts], token by token and expert by expert."""
    logits = states.float() @ layer.router.weight.float().T
    probabilities = logits.softmax(-1)
    weights, chosen = probabilities.topk(topk, dim=-1)
    if renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    output = torch.zeros_like(states)
    for number, expert in enumerate(layer.experts.local_experts):
        gate, up = (states @ expert.linear_fc1.weight.T).chunk(2, -1)
        served = (F.silu(gate) * up) @ expert.linear_fc2.weight.T
        output = output + served * (weights * (chosen == number)).sum(-1, keepdim=True).to(states.dtype)
    return output, logits


def against_plain() -> dict[str, dict[str, float]]:
    """For each of `CASES` the largest relative differences of output, losses and gradients."""
    _start()
    return {name: _against_plain(**changes) for name, changes in CASES.items()}


def _against_plain(**changes: Any) -> dict[str, float]:
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    from minicpm_megatron.model.experts import set_auxiliary_loss_scale

    layer = _layer(**changes)
    config = layer.config
    layer.train()
    topk = config.moe_router_topk
    directions = put(torch.randn(LENGTH, BATCH, 96, generator=torch.Generator().manual_seed(2)))
    set_auxiliary_loss_scale(1.0, device())
    mine = _input()
    output, _ = layer(mine)
    (output * directions).sum().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}
    load = layer.router.take_load()

    layer.zero_grad()
    theirs = _input()
    expected, logits = plain(layer, theirs, topk, not config.moe_router_pre_softmax)
    if config.moe_router_load_balancing_type == "seq_aux_loss":
        rows = [(logits[:, row],) for row in range(BATCH)]
    else:
        rows = [(logits.reshape(-1, EXPERTS),)]
    # transformers sums the fractions of all k choices, Megatron-Core takes their mean
    balance = sum(load_balancing_loss_func(row, EXPERTS, topk) / topk for row in rows) / len(rows)
    z_loss = logits.logsumexp(-1).square().mean()
    loss = (expected * directions).sum() + config.moe_aux_loss_coeff * balance
    (loss + (config.moe_z_loss_coeff or 0.0) * z_loss).backward()

    def apart(first: torch.Tensor, second: torch.Tensor) -> float:
        return float((first - second).abs().max() / second.abs().max())

    found = {name: apart(gradients[name], parameter.grad) for name, parameter in layer.named_parameters()}
    chosen = logits.topk(topk, dim=-1).indices.flatten().bincount(minlength=EXPERTS)
    return found | {
        "output": apart(output, expected),
        "input": apart(mine.grad, theirs.grad),
        "balance": abs(float(load.auxiliary) / float(balance) - 1),
        "tokens": float((load.tokens - chosen).abs().max()),
        "entropy": abs(float(load.entropy) / float(-(logits.softmax(-1) * logits.log_softmax(-1)).sum()) - 1),
    }


def test_output_gradients_and_losses_are_those_of_plain_torch():
    (found,) = run_on_ranks("tests.model.test_experts:against_plain", 1)
    assert set(found) == set(CASES)
    for differences in found.values():
        assert len(differences) == 2 * EXPERTS + 6
        assert max(differences.values()) < 2e-5, found


def grouped_against_sequential() -> dict[str, float]:
    """Largest relative differences between one grouped product and one expert after the other."""
    from megatron.core.transformer.moe.experts import SequentialMLP

    from minicpm_megatron.model.experts import side_by_side

    _start()
    experts = _layer().experts

    def one_by_one(*arguments: torch.Tensor) -> Any:
        return SequentialMLP.forward(experts, *arguments)  # on CUDA the layer itself would choose the grouped product

    tokens_per_expert = torch.tensor([7, 0, 30, 1, 0, 12, 9, 5])
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        experts.to(dtype)
        if dtype == torch.bfloat16:  # as ZeRO lays weights
            flat = torch.cat([parameter.detach().flatten() for parameter in experts.parameters()])
            for parameter, part in zip(
                experts.parameters(), flat.split([p.numel() for p in experts.parameters()]), strict=True
            ):
                parameter.data = part.view_as(parameter)
        first = [expert.linear_fc1.weight for expert in experts.local_experts]
        joined = side_by_side(first)
        assert torch.equal(joined, torch.stack(first))
        assert (joined.data_ptr() == first[0].data_ptr()) == (dtype == torch.bfloat16)
        generator = torch.Generator().manual_seed(3)
        weights = put(torch.rand(64, generator=generator))
        results = []
        for form in (one_by_one, lambda *arguments: (experts.grouped(*arguments), None)):
            experts.zero_grad()
            generator = torch.Generator().manual_seed(5)
            tokens = put(torch.randn(64, 96, generator=generator).to(dtype)).requires_grad_()
            scale = weights.clone().requires_grad_()
            output, _ = form(tokens, tokens_per_expert, scale)
            (output.float() * put(torch.randn(64, 96, generator=generator))).sum().backward()
            gradients = {name: parameter.grad.float().clone() for name, parameter in experts.named_parameters()}
            results.append(
                {"output": output.detach().float(), "in": tokens.grad.float(), "weights": scale.grad} | gradients
            )
        for name, first in results[0].items():
            size = float(first.abs().max()) or 1.0
            found[f"{dtype} {name}"] = float((first - results[1][name]).abs().max()) / size
    return found


def test_one_grouped_product_computes_what_the_experts_do_one_by_one():
    (found,) = run_on_ranks("tests.model.test_experts:grouped_against_sequential", 1)
    assert len(found) == 2 * (3 + 2 * EXPERTS)
    assert max(value for name, value in found.items() if "float32" in name) < 1e-5, found
    assert max(found.values()) < 1e-2, found  # bf16 has 8 bits


def moe_counts() -> int:
    """Parameters of the real module but the embedding's, built without memory."""
    import minicpm_megatron as library

    _start()
    config = library.MiniCPMConfig.from_recipe(library.presets["minicpm-moe-8x2b"])
    with torch.device("meta"):
        model = library.MiniCPMModel(config)
    return sum(p.numel() for n, p in model.named_parameters() if "word_embeddings" not in n)


@pytest.mark.cpu_only("on CUDA Megatron-Core would allocate the weights of which only the number is wanted")
def test_the_mixture_of_eight_has_the_parameters_that_the_closed_form_counts():
    from minicpm_megatron.recipe import count_parameters, get_preset

    (found,) = run_on_ranks("tests.model.test_experts:moe_counts", 1)
    assert found == count_parameters(get_preset("minicpm-moe-8x2b")).non_embedding == 13_590_468_864
