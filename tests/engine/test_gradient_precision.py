"""bf16 training hands the optimizer gradients that were summed in fp32, at every ZeRO stage.

The reference sums, in fp64, the bf16 gradients that autograd makes of each micro-batch of each rank. The engine's scale
factors are powers of two, so that only its sums can differ. Sums in bf16 have errors of 1e-3 and more, as have fp32
sums that are cast to bf16 before the update.
"""

from __future__ import annotations

from typing import Any

import deepspeed  # noqa: F401  (forks should find it imported)
import pytest
import torch
from megatron.core import parallel_state

from minicpm_megatron.engine.build import build_engine, build_model
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.initialize import initialize_parameters
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import build
from tests.device import deterministic, put, ranks
from tests.distributed.forked import Outcome, run_forked

RANKS, ACCUMULATION, VOCABULARY = ranks(2), 16, 64
CASES = [{"stage": stage, "precision": "bf16"} for stage in range(4)] + [{"stage": 0, "precision": "fp32"}]


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Relative error of this rank's accumulated gradient, and the share of its values that are exactly bf16."""
    deterministic()  # reference and engine make the same bf16 gradients
    recipe = build(
        {
            "name": "precision",
            "preset": "minicpm-nano",
            "model": {"vocab_size": VOCABULARY, "dim_model_base": 64},
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 8},
            "training": {
                "global_batch_size": ACCUMULATION * RANKS,
                "micro_batch_size": 1,
                "precision": case["precision"],
            },
            "schedule": {"shape": "constant", "total": 10},
            "deepspeed": {"zero_stage": case["stage"]},
        }
    )
    layout = recipe.check_world_size(RANKS)
    if not parallel_state.model_parallel_is_initialized():
        groups.initialize(layout)
    config = MiniCPMConfig.from_recipe(recipe.model, precision=case["precision"], perform_initialization=False)
    reference, model = build_model(config, recipe), build_model(config, recipe)
    for each in (reference, model):
        initialize_parameters(each, config, seed=1)
    if case["stage"] == 0:
        # the engine asks autograd for fp32, which then rounds the gradients of norms and of a tied head less often
        for parameter in reference.parameters():
            parameter.grad_dtype = torch.float32
    chance = torch.Generator().manual_seed(0)
    batches = put(torch.randint(VOCABULARY, (RANKS, ACCUMULATION, 1, 9), generator=chance))
    expected: dict[str, torch.Tensor] = {}
    for tokens in batches.flatten(0, 1):
        reference(tokens[:, :-1].contiguous(), labels=tokens[:, 1:].contiguous()).mean().backward()
        for name, parameter in reference.named_parameters():
            gradient = parameter.grad.double() / (RANKS * ACCUMULATION)
            expected[name] = expected[name] + gradient if name in expected else gradient
            parameter.grad = None
    engine = build_engine(model, config, recipe, layout)
    engine.train()
    engine.accumulate(((tokens[:, :-1], tokens[:, 1:]) for tokens in batches[rank]), ACCUMULATION)
    difference = total = 0.0
    found = []
    for parameter, spec, piece in EngineState(engine).owned():
        gradient = engine.zero.gradient(parameter, piece)
        assert gradient.dtype == torch.float32
        valid = min(piece.master.numel(), spec.numel - piece.start)
        right = expected[spec.name].view(-1)[piece.start : piece.start + valid]
        difference += float((gradient[:valid].double() - right).square().sum())
        total += float(right.square().sum())
        found.append(gradient[:valid])
    values = torch.cat([put(torch.zeros(1)), *found])  # without ZeRO rank 0 alone owns everything
    values = values[values != 0]
    return {
        "difference": difference,
        "total": total,
        "bf16": float((values == values.bfloat16().float()).double().mean()) if values.numel() else None,
        "optimizer": type(engine.optimizer).__name__,
    }


@pytest.fixture(scope="module")
def outcomes() -> list[list[Outcome]]:
    return run_forked("tests.engine.test_gradient_precision:worker", [case | {"ranks": RANKS} for case in CASES])


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"ZeRO {c['stage']} {c['precision']}" for c in CASES])
def test_the_optimizer_is_given_fp32_sums(number: int, outcomes: list[list[Outcome]]) -> None:
    ranks = outcomes[number]
    assert [rank.status for rank in ranks] == [0] * RANKS, "".join(rank.log for rank in ranks)
    error = sum(r.result["difference"] for r in ranks) / sum(r.result["total"] for r in ranks)
    # fp32 rounds to 6e-8; bf16 sums have 1e-3 and more
    assert error**0.5 < 1e-6
    assert all(rank.result["bf16"] < 0.5 for rank in ranks if rank.result["bf16"] is not None)
