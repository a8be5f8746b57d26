"""`training.deterministic`: what it sets, what it refuses, and that the model trains under it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.model import attention, document_attention
from minicpm_megatron.model.attention_kernels import auto
from minicpm_megatron.parallel.determinism import ENVIRONMENT, make_deterministic
from minicpm_megatron.recipe import Layout, build
from tests.device import put
from tests.distributed.forked import run_forked


@pytest.fixture(autouse=True)
def untouched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Give torch and the environment back as they were."""
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that monkeypatch restores what make_deterministic sets
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_libraries_are_told_before_they_start() -> None:
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8" and os.environ["NCCL_ALGO"] == "Ring"
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()


def test_a_users_deterministic_value_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    make_deterministic()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


@pytest.mark.parametrize(("name", "value"), [("NCCL_ALGO", "Tree"), ("CUBLAS_WORKSPACE_CONFIG", ":0:0")])
def test_another_value_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"training.deterministic: {name} is '{value}'.*unset it") as refusal:
        make_deterministic()
    assert "\n" not in str(refusal.value) and not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("deterministic", [False, True])
def test_flash_attn_is_asked_for_its_deterministic_backward(
    monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    asked = []

    def flash(query: torch.Tensor, *_: Any, **options: Any) -> torch.Tensor:
        asked.append(options["deterministic"])
        return query

    torch.use_deterministic_algorithms(deterministic)
    monkeypatch.setattr(auto, "flash_attn_func", flash)
    monkeypatch.setattr(auto, "_flash_fits", lambda *_: True)
    monkeypatch.setattr(document_attention, "flash_attn_varlen_func", flash)
    q = torch.zeros(4, 1, 2, 8)
    core = attention.MiniCPMCoreAttention.__new__(attention.MiniCPMCoreAttention)
    torch.nn.Module.__init__(core)
    core.across_ranks, core.attn_mask_type, core.softmax_scale = None, attention.AttnMaskType.causal, 1.0
    core.kernel = auto.KERNEL
    core(q, q, q, None)
    document_attention._by_flash(q, q, q, torch.zeros(1, 4, dtype=torch.int64), 1.0)
    assert asked == [deterministic] * 2


def train(rank: int, case: dict[str, Any]) -> list[list[float]]:
    """Losses and gradient norms of three steps, twice over."""
    from minicpm_megatron.engine.build import build_engine, build_model
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters
    from minicpm_megatron.parallel import groups

    make_deterministic()
    recipe = build(
        {
            "name": "deterministic",
            "preset": "minicpm-nano",
            "model": {"vocab_size": 64, "dim_model_base": 64} | case["model"],
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 8, **case["data"]},
            "training": {
                "global_batch_size": 4,
                "micro_batch_size": 2,
                "precision": "bf16",
                "recompute": "full",
                "deterministic": True,
            },
            "schedule": {"shape": "constant", "total": 10},
            "deepspeed": {"zero_stage": case["stage"]},
        }
    )
    layout: Layout = recipe.check_world_size(1)
    groups.initialize(layout)
    config = MiniCPMConfig.from_recipe(
        recipe.model, precision="bf16", recompute="full", perform_initialization=False, deterministic_mode=True
    )
    found = []
    for _ in range(2):
        model = build_model(config, recipe)
        initialize_parameters(model, config, seed=1)
        engine = build_engine(model, config, recipe, layout)
        engine.train()
        chance, numbers = torch.Generator().manual_seed(0), []
        for _ in range(3):
            tokens = put(torch.randint(64, (2, 2, 9), generator=chance))
            batches = [(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in tokens]
            numbers += [float(engine.accumulate(batches, 2)), engine.step().gradient_norm]
        found.append(numbers)
    return found


def test_the_model_trains_under_it() -> None:
    experts = {"num_moe_experts": 4, "moe_router_topk": 2}
    cases = [
        {"ranks": 1, "stage": 1, "model": {}, "data": {}},
        {"ranks": 1, "stage": 3, "model": {}, "data": {}},
        {"ranks": 1, "stage": 2, "model": experts, "data": {}},
    ]
    for (outcome,) in run_forked("tests.parallel.test_determinism:train", cases):
        assert outcome.status == 0, outcome.log
        first, second = outcome.result
        assert first == second and len(set(first)) == len(first)
