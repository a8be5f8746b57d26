"""ZeRO 1 with gradients that stay where they are gives DeepSpeed's own numbers, bit for bit on two ranks."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.runtime import bf16_optimizer, utils
from deepspeed.runtime.zero import stage_1_and_2

from minicpm_megatron.engine import patches
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.engine.zero.flat_gradients import FlatGradientOptimizer
from minicpm_megatron.engine.zero.stage1_bf16 import Stage1Bf16
from minicpm_megatron.engine.zero.stages_1_and_2 import Stages1And2
from minicpm_megatron.engine.zero.stand_in import standing_in
from tests.distributed.forked import Outcome, run_forked
from tests.engine.test_engine import Two, _engine

pytestmark = pytest.mark.cpu_only("engine/zero/flat_gradients.py leaves DeepSpeed as it is on CUDA")

CASES = {
    "fp32": {"precision": "fp32"},
    "fp32 accumulation 3": {"precision": "fp32", "samples": 12},
    "bf16": {"precision": "bf16"},
    "bf16 accumulation 3": {"precision": "bf16", "samples": 12},
    "settings": {"precision": "fp32", "zero": {"reduce_bucket_size": 1000}},
}


def _send_as_deepspeed_does() -> None:
    """Undo `flat_gradients.prepare`."""
    for module in (stage_1_and_2, bf16_optimizer):
        module.all_gather_dp_groups = utils.all_gather_dp_groups


def train(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Six updates, the third of them not finite: what each said, and a digest of the state that they left."""
    stock = {"fp32": Stages1And2, "bf16": Stage1Bf16}[case["precision"]]
    engine = _engine({"stage": 1, **case}, **({"adapter": stock} if case["stock"] else {}))
    if case["stock"]:
        _send_as_deepspeed_does()
    ours = not case["stock"] and case["precision"] == "fp32"  # bf16 has DeepSpeed's BF16_Optimizer
    assert isinstance(engine.optimizer, FlatGradientOptimizer) == ours
    count = engine.set_global_batch_size(case.get("samples", 4))
    engine.train()
    factor = 1.0
    next(engine.module.parameters()).register_hook(lambda gradient: gradient * factor)
    generator = torch.Generator().manual_seed(rank)
    said = []
    for step in range(6):
        batches = torch.randint(64, (count, 2, 9), generator=generator)
        factor = math.inf if step == 2 else 1.0
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
    patches.prepare()
    model = Sometimes()
    if case["stock"]:
        _send_as_deepspeed_does()
        ours = contextlib.nullcontext()
    else:
        ours = standing_in(stage_1_and_2.DeepSpeedZeroOptimizer, FlatGradientOptimizer)
    with ours:
        engine, optimizer, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
            config={"train_batch_size": 4, "zero_optimization": {"stage": 1, "overlap_comm": False}},
            dist_init_required=False,
        )
    assert isinstance(optimizer, FlatGradientOptimizer) != case["stock"]
    history = []
    for step in range(4):
        engine.backward(engine(torch.full((2, 4), 1.0 + rank + step)))
        engine.step()
        history.append(torch.cat([parameter.detach().view(-1) for parameter in model.parameters()]).tolist())
    return history


def _pairs(target: str, cases: list[dict[str, Any]]) -> list[list[list[Outcome]]]:
    outcomes = run_forked(
        f"tests.engine.zero.test_flat_gradients:{target}", [c | {"stock": s} for c in cases for s in (True, False)]
    )
    for outcome in outcomes:
        assert [rank.status for rank in outcome] == [0, 0], outcome[0].log + outcome[1].log
    return [outcomes[start : start + 2] for start in range(0, len(outcomes), 2)]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Outcome]]]:
    cases = []
    for case in CASES.values():
        config = None
        if "zero" in case:
            config = tmp_path_factory.mktemp("json") / "deepspeed.json"
            config.write_text(json.dumps({"zero_optimization": case["zero"]}))
        cases.append(case | {"config": config and str(config)})
    return dict(zip(CASES, _pairs("train", cases), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_numbers_are_those_of_deepspeed(name: str, runs: dict[str, list[list[Outcome]]]) -> None:
    stock, flat = ([rank.result for rank in outcome] for outcome in runs[name])
    assert flat == stock
    assert [applied for *_, applied in flat[0]["said"]] == [True, True, False, True, True, True]


def test_a_parameter_without_a_gradient_is_stepped_with_zero() -> None:
    ((stock, flat),) = _pairs("without_gradient", [{}])
    assert [rank.result for rank in flat] == [rank.result for rank in stock]
