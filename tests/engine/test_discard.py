"""A batch that is discarded after its backward leaves no trace in the engine, at every ZeRO stage and in a pipeline."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import deepspeed  # noqa: F401  (forks should find it imported)
import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from minicpm_megatron.engine.build import build_engine, build_model
from minicpm_megatron.engine.engine import Engine, MicroBatch
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.initialize import initialize_parameters
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import build
from tests.device import deterministic, on_cuda, put, ranks
from tests.distributed.forked import Outcome, run_forked

ACCUMULATION = 2
COMBINATIONS = [(stage, precision, 1, "none", "adamw") for stage in range(4) for precision in ("fp32", "bf16")]
COMBINATIONS += [(0, "fp32", 1, "none", "muon"), (1, "bf16", 1, "none", "muon")]
COMBINATIONS += [(2, "fp32", 1, "none", "muon"), (3, "fp32", 1, "none", "muon")]
if not on_cuda():  # where DeepSpeed compiles an Adam for the host, and two stages want two GPUs
    COMBINATIONS += [(stage, precision, 1, "cpu", "adamw") for stage in (1, 2, 3) for precision in ("fp32", "bf16")]
    COMBINATIONS += [(0, "fp32", 2, "none", "adamw"), (1, "fp32", 2, "none", "adamw")]
    COMBINATIONS += [(1, "bf16", 2, "none", "adamw"), (1, "fp32", 2, "cpu", "adamw"), (1, "fp32", 2, "none", "muon")]


def _engine(case: dict[str, Any]) -> Engine:
    recipe = build(
        {
            "name": "engine",
            "preset": "minicpm-nano",
            "model": {"vocab_size": 64, "dim_model_base": 64},
            "data": {"train": [{"prefix": "unused"}], "sequence_length": 8},
            "training": {
                "global_batch_size": 2 * ACCUMULATION * dist.get_world_size() // case["stages"],
                "micro_batch_size": 2,
                "precision": case["precision"],
                "gradient_clipping": 0.5,
            },
            "optimizer": {"name": case["optimizer"]},
            "schedule": {"shape": "constant", "total": 10},
            "parallel": {"pipeline_model_parallel_size": case["stages"]},
            "deepspeed": {"zero_stage": case["stage"], "offload_optimizer": case["offload"]},
        }
    )
    layout = recipe.check_world_size(dist.get_world_size())
    if not parallel_state.model_parallel_is_initialized():
        groups.initialize(layout)
    config = MiniCPMConfig.from_recipe(recipe.model, recipe.parallel, precision=case["precision"], recompute="none")
    model = build_model(config, recipe)
    initialize_parameters(model, config, seed=1)
    engine = build_engine(model, config, recipe, layout)
    engine.train()
    return engine


def _batch(seed: int, rank: int, case: dict[str, Any]) -> list[MicroBatch]:
    chance = torch.Generator().manual_seed(seed if case["stages"] > 1 else 2 * seed + rank)
    both = put(torch.randint(0, 64, (ACCUMULATION, 2, 9), generator=chance))
    return [(micro[:, :-1].contiguous(), micro[:, 1:].contiguous()) for micro in both]


def _state(engine: Engine) -> list[Any]:
    """Hash of this rank's weights, masters and moments, and Adam's count of updates."""
    state, digest = EngineState(engine), hashlib.sha256()
    # what all ranks hold is saved by the first alone; what ZeRO 3 divides is whole only while it is in use
    whole = [parameter for parameter in engine.names if not hasattr(parameter, "ds_id")]
    for tensor in [*(fragment.tensor for fragment in state.fragments()), *whole]:
        digest.update(tensor.detach().float().cpu().numpy().tobytes())
    return [digest.hexdigest(), state.updates()]


def _step(engine: Engine, batch: list[MicroBatch]) -> list[Any]:
    """Loss, norm told before the update and by it, and the state after it."""
    loss = float(engine.accumulate(batch, ACCUMULATION))
    norm = engine.gradient_norm()
    update = engine.step()
    assert update.applied
    return [loss, norm, update.gradient_norm, *_state(engine)]


def worker(rank: int, case: dict[str, Any]) -> dict[str, Any]:
    """Three steps, the same three with batches between that are discarded, and the states around those."""
    deterministic()
    batches = [_batch(seed, rank, case) for seed in range(5)]
    engine = _engine(case)
    plain = [_step(engine, batch) for batch in batches[:3]]
    engine = _engine(case)
    disturbed, around = [], []
    for number, batch in enumerate(batches[:3]):
        disturbed.append(_step(engine, batch))
        if number < 2:
            around.append(_state(engine))
            engine.accumulate(batches[3 + number], ACCUMULATION)
            engine.discard()
            around.append(_state(engine))
            poisoned = next(engine.module.parameters())
            hook = poisoned.register_hook(lambda gradient: gradient * float("nan")) if rank == 0 else None
            engine.accumulate(batches[4 - number], ACCUMULATION)
            norm = engine.gradient_norm()
            update = engine.step()
            assert not update.applied and not math.isfinite(update.gradient_norm) and not math.isfinite(norm)
            around.append(_state(engine))
            if hook is not None:
                hook.remove()
    return {"plain": plain, "disturbed": disturbed, "around": around}


@pytest.fixture(scope="module")
def jobs() -> dict[tuple[int, str, int, str, str], list[Outcome]]:
    keys = ("stage", "precision", "stages", "offload", "optimizer")
    cases = [dict(zip(keys, combination, strict=True), ranks=ranks(2)) for combination in COMBINATIONS]
    return dict(zip(COMBINATIONS, run_forked("tests.engine.test_discard:worker", cases), strict=True))


@pytest.mark.parametrize("combination", COMBINATIONS)
def test_a_discarded_batch_leaves_no_trace(combination: tuple[int, str, int, str, str], jobs: Any) -> None:
    outcome = jobs[combination]
    assert [rank.status for rank in outcome] == [0] * ranks(2), "".join(rank.log for rank in outcome)
    for rank in outcome:
        before, discarded, refused = (rank.result["around"][start::3] for start in range(3))
        assert before == discarded == refused
        assert rank.result["plain"] == rank.result["disturbed"]
        # and there was something to leave a trace on: every step moved the weights and was counted
        assert [step[-1] for step in rank.result["plain"]] == [1, 2, 3]
        assert len({step[-2] for step in rank.result["plain"]}) == 3
    for step in outcome[0].result["plain"]:
        assert step[1] == pytest.approx(step[2], rel=1e-6), "the norm before the update is that of the update"
