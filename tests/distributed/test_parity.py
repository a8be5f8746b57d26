"""One run, any layout: the same losses and gradient norms to 5 digits over 20 steps.

Every layout trains the same tiny model on the same samples through the real engine; the schedule warms up, so that no
step amplifies rounding. bf16 rounds each product to 3 digits, so its losses are held to 3e-3 of those in fp32.
"""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pytest

from tests.distributed.launch import run_on_ranks

STEPS, BATCH, SEQUENCE, VOCABULARY = 20, 8, 32, 500
DIGITS = 5
BF16_TOLERANCE = 3e-3  # measured 7e-4

ALONE = {
    "1 process": {},
    "accumulation 4": {"micro": 2},
    "recompute full": {"recompute": "full"},
    "recompute selective": {"recompute": "selective"},
    "ZeRO 1 alone": {"zero": 1},
}
TWO = {
    "DP2": {},
    "DP2 accumulation 2": {"micro": 2},
    "TP2": {"tp": 2},
    "TP2 SP": {"tp": 2, "sp": True},
    "ZeRO 1": {"zero": 1},
    "ZeRO 2": {"zero": 2},
    "ZeRO 3": {"zero": 3},
    "ZeRO 1 accumulation 2": {"zero": 1, "micro": 2},
    "TP2 SP recompute": {"tp": 2, "sp": True, "recompute": "full"},
    "TP2 ZeRO 3": {"tp": 2, "zero": 3},
    "PP2": {"pp": 2, "micro": 2},
    "PP2 ZeRO 1 recompute": {"pp": 2, "zero": 1, "micro": 2, "recompute": "full"},
}
FOUR = {
    "TP2 DP2 ZeRO 1": {"tp": 2, "zero": 1},
    "TP2 SP DP2 ZeRO 2": {"tp": 2, "sp": True, "zero": 2},
    "PP2 DP2 ZeRO 1": {"pp": 2, "zero": 1, "micro": 2},
    "PP2 TP2": {"pp": 2, "tp": 2, "micro": 2},
    "PP2 TP2 SP ZeRO 1": {"pp": 2, "tp": 2, "sp": True, "zero": 1, "micro": 2},
}
BF16_TWO = {f"bf16 ZeRO {stage}": {"zero": stage, "precision": "bf16"} for stage in range(4)}
BF16_TWO |= {"bf16 PP2 ZeRO 1": {"pp": 2, "zero": 1, "micro": 2, "precision": "bf16"}}
UNTIED = {"TP2 SP": {"tp": 2, "sp": True}, "ZeRO 3": {"zero": 3}, "PP2": {"pp": 2, "micro": 2}}
UNEVEN = {
    "PP4 by parameters": {"pp": 4, "micro": 2},
    "PP4 of 2, 1, 1, 1": {"pp": 4, "micro": 1, "zero": 1, "layers": [2, 1, 1, 1]},
    "bf16 PP4": {"pp": 4, "micro": 2, "zero": 1, "precision": "bf16"},
    "PP2 DP2 of 1, 4": {"pp": 2, "micro": 2, "zero": 1, "layers": [1, 4]},
}


def samples(step: int) -> np.ndarray:
    """int64 [BATCH, SEQUENCE + 1]; a first-order Markov chain, so that there is something to learn."""
    random = np.random.default_rng(step)
    rows = np.empty((BATCH, SEQUENCE + 1), dtype=np.int64)
    rows[:, 0] = random.integers(VOCABULARY, size=BATCH)
    for place in range(SEQUENCE):
        rows[:, place + 1] = (7 * rows[:, place] + random.integers(3, size=BATCH)) % VOCABULARY
    return rows


def train(
    layouts: dict[str, dict[str, Any]], untied: bool = False, num_layers: int = 2
) -> dict[str, list[list[float]]]:
    """Layout -> [loss, gradient norm] of every step."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from minicpm_megatron.data.sampling import batch
    from minicpm_megatron.engine.build import build_engine, build_model
    from minicpm_megatron.methods.schedules import build_schedule
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import BatchPlan, build

    world = int(os.environ["WORLD_SIZE"])
    results = {}
    for name, case in layouts.items():
        tensor_parallel, precision = case.get("tp", 1), case.get("precision", "fp32")
        replicas = world // (tensor_parallel * case.get("pp", 1))
        recipe = build(
            {
                "name": "parity",
                "preset": "minicpm-nano",
                "model": {
                    "vocab_size": VOCABULARY,
                    "dim_model_base": 64,
                    "num_layers": num_layers,
                    "untie_embeddings_and_output_weights": untied,
                },
                "data": {"train": [{"prefix": "unused"}], "sequence_length": SEQUENCE},
                "parallel": {
                    "tensor_model_parallel_size": tensor_parallel,
                    "sequence_parallel": case.get("sp", False),
                    "pipeline_model_parallel_size": case.get("pp", 1),
                    "pipeline_layers": case.get("layers"),
                },
                "training": {
                    "global_batch_size": BATCH,
                    "micro_batch_size": case.get("micro", BATCH // replicas),
                    "precision": precision,
                    "recompute": case.get("recompute", "none"),
                },
                "optimizer": {"lr": 0.002},
                "schedule": {"warmup": 10, "total": STEPS, "decay": 5, "decay_shape": "linear"},
                "deepspeed": {"zero_stage": case.get("zero", 0)},
            }
        )
        layout = recipe.check_world_size(world)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        groups.initialize(layout, init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")
        config = MiniCPMConfig.from_recipe(
            recipe.model, recipe.parallel, precision=precision, recompute=recipe.training.recompute
        )
        model = build_model(config, recipe)
        initialize_parameters(model, config, seed=3)
        engine = build_engine(model, config, recipe, layout)
        schedule, plan = build_schedule(recipe.schedule), BatchPlan(recipe)
        engine.train()
        lines = []
        for step in range(STEPS):
            engine.set_rates(schedule.factor(plan.position(step)))
            rows = samples(step)
            mine = batch(0, BATCH, parallel_state.get_data_parallel_rank(), replicas, recipe.training.micro_batch_size)
            batches = (torch.from_numpy(rows[indices]) for indices in mine)
            total = engine.accumulate(
                ((both[:, :-1].contiguous(), both[:, 1:].contiguous()) for both in batches), len(mine)
            )
            update = engine.step()
            dist.all_reduce(total)
            lines.append([float(total) / world, update.gradient_norm])
        results[name] = lines
    return results


def digits(first: float, second: float) -> float:
    """Leading decimal digits in which two numbers agree."""
    return 16.0 if first == second else -math.log10(abs(first - second) / abs(first))


def agreement(reference: list[list[float]], other: list[list[float]]) -> float:
    """Fewest digits of any loss or gradient norm."""
    return min(digits(a, b) for one, two in zip(reference, other, strict=True) for a, b in zip(one, two, strict=True))


@pytest.fixture(scope="module")
def reference() -> list[list[float]]:
    return _train(1, {"1 process": {}})["1 process"]


def _train(world: int, layouts: dict[str, dict[str, Any]], **keywords: Any) -> dict[str, list[list[float]]]:
    return run_on_ranks("tests.distributed.test_parity:train", world, timeout=280, layouts=layouts, **keywords)[0]


@pytest.mark.parametrize(("world", "layouts"), [(1, ALONE), (2, TWO), (4, FOUR)], ids=["1 rank", "2 ranks", "4 ranks"])
def test_every_layout_gives_the_same_run(reference, world, layouts):
    results = _train(world, layouts)
    table = {name: agreement(reference, lines) for name, lines in results.items()}
    for name, value in table.items():
        print(
            f"{name:24} loss {results[name][-1][0]:.7f}  gradient norm {results[name][-1][1]:.7f}  {value:.1f} digits"
        )
    assert reference[-1][0] < reference[0][0] - 0.5  # it learns, so the comparison means something
    assert all(value >= DIGITS for value in table.values()), table


def test_an_untied_head_gives_the_same_run():
    whole = _train(1, {"1 process": {}}, untied=True)["1 process"]
    for name, lines in _train(2, UNTIED, untied=True).items():
        assert agreement(whole, lines) >= DIGITS, name


def test_layers_that_stages_do_not_divide_give_the_same_run():
    whole = _train(1, {"1 process": {}}, num_layers=5)["1 process"]
    results = _train(4, UNEVEN, num_layers=5)
    low = results.pop("bf16 PP4")
    assert max(abs(a[0] - b[0]) / a[0] for a, b in zip(whole, low, strict=True)) < BF16_TOLERANCE
    for name, lines in results.items():
        assert agreement(whole, lines) >= DIGITS, name


def test_bf16_stays_close_to_fp32_at_every_stage(reference):
    for name, lines in _train(2, BF16_TWO).items():
        furthest = max(abs(a[0] - b[0]) / a[0] for a, b in zip(reference, lines, strict=True))
        print(f"{name}: losses within {furthest:.1e} of fp32")
        assert furthest < BF16_TOLERANCE, name
