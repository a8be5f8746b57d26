"""ZeRO 1 with gradients that stay where they are gives DeepSpeed's own numbers, bit for bit on two ranks."""

from __future__ import annotations

import hashlib
from typing import Any

import deepspeed
import pytest
import torch

from minicpm_megatron.engine import patches, zero1
from minicpm_megatron.engine.state import EngineState
from tests.distributed.forked import Outcome, run_forked
from tests.engine.test_engine import Two, _engine

pytestmark = pytest.mark.cpu_only("engine/zero1.py leaves DeepSpeed as it is on CUDA")

CASES = {
    "fp32": {"precision": "fp32"},
    "fp32 accumulation 3": {"precision": "fp32", "samples": 12},
    "bf16": {"precision": "bf16"},
    "bf16 accumulation 3": {"precision": "bf16", "samples": 12},
    "settings": {"precision": "fp32", "zero": {"round_robin_gradients": True, "reduce_bucket_size": 1000}},
}


def _choose(case: dict[str, Any]) -> None:
    """Leave DeepSpeed as it comes, or ours in its place."""
    if case["stock"]:
        zero1.keep_gradients_flat = lambda optimizer: None
        zero1.prepare = lambda: None
    if "zero" in case:
        from minicpm_megatron.engine import engine

        resolve = engine.deepspeed_config

        def overlaid(*arguments: Any) -> dict[str, Any]:
            config = resolve(*arguments)
            config["zero_optimization"] |= case["zero"]
            return config

        engine.deepspeed_config = overlaid


def train(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Six updates, the third of them not finite: what each said, and a digest of the state that they left."""
    _choose(case)
    engine = _engine({"stage": 1, **case})
    ours = not case["stock"] and case["precision"] == "fp32"  # bf16 has DeepSpeed's BF16_Optimizer
    assert isinstance(engine.optimizer, zero1.FlatGradientOptimizer) == ours
    count = engine.set_global_batch_size(case.get("samples", 4))
    engine.train()
    generator = torch.Generator().manual_seed(rank)
    said = []
    for step in range(6):
        batches = torch.randint(64, (count, 2, 9), generator=generator)
        if step == 2:
            engine.backward(engine.losses(batches[0, :, :-1], batches[0, :, 1:]).mean() * float("inf"))
            for _ in range(count - 1):
                engine.deepspeed.step()
                engine.backward(engine.losses(batches[0, :, :-1], batches[0, :, 1:]).mean())
            loss = 0.0
        else:
            loss = float(engine.accumulate(((batch[:, :-1], batch[:, 1:]) for batch in batches), count))
        update = engine.step()
        said.append([loss, update.gradient_norm if update.applied else None, update.applied])
    digest = hashlib.sha256()
    for fragment in EngineState(engine).fragments():
        digest.update(repr((fragment.spec.name, fragment.kind, fragment.start)).encode())
        digest.update(fragment.tensor.numpy().tobytes())
    for parameter in engine.module.parameters():
        digest.update(parameter.detach().float().numpy().tobytes())
    return {"said": said, "digest": digest.hexdigest()}


class Sometimes(Two):
    """A vector that takes part in every second batch only."""

    uses = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.uses += 1
        return super().forward(x) if self.uses % 2 else (x @ self.w).square().mean()


def without_gradient(rank: int, case: dict[str, Any]) -> list[list[float]]:
    """Parameters after each of four updates, of which every second gives the vector no gradient."""
    _choose(case)
    patches.prepare()
    model = Sometimes()
    engine, optimizer, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        config={"train_batch_size": 4, "zero_optimization": {"stage": 1, "overlap_comm": False}},
        dist_init_required=False,
    )
    zero1.keep_gradients_flat(optimizer)
    history = []
    for step in range(4):
        engine.backward(engine(torch.full((2, 4), 1.0 + rank + step)))
        engine.step()
        history.append(torch.cat([parameter.detach().view(-1) for parameter in model.parameters()]).tolist())
    return history


def _pairs(target: str, cases: list[dict[str, Any]]) -> list[list[list[Outcome]]]:
    outcomes = run_forked(f"tests.engine.test_zero1:{target}", [c | {"stock": s} for c in cases for s in (True, False)])
    for outcome in outcomes:
        assert [rank.status for rank in outcome] == [0, 0], outcome[0].log + outcome[1].log
    return [outcomes[start : start + 2] for start in range(0, len(outcomes), 2)]


@pytest.fixture(scope="module")
def runs() -> dict[str, list[list[Outcome]]]:
    return dict(zip(CASES, _pairs("train", list(CASES.values())), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_deepspeed(name: str, runs: dict[str, list[list[Outcome]]]) -> None:
    stock, flat = ([rank.result for rank in outcome] for outcome in runs[name])
    assert flat == stock
    assert [applied for *_, applied in flat[0]["said"]] == [True, True, False, True, True, True]


def test_a_parameter_without_a_gradient_is_stepped_with_zero() -> None:
    ((stock, flat),) = _pairs("without_gradient", [{}])
    assert [rank.result for rank in flat] == [rank.result for rank in stock]


def test_settings_that_it_does_not_know_leave_the_optimizer_as_it_is() -> None:
    optimizer = zero1.DeepSpeedZeroOptimizer.__new__(zero1.DeepSpeedZeroOptimizer)
    optimizer.partition_gradients = optimizer.cpu_offload = optimizer.has_moe_layers = False
    optimizer.overlap_comm = True
    zero1.keep_gradients_flat(optimizer)
    assert type(optimizer) is zero1.DeepSpeedZeroOptimizer
