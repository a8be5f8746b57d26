"""The same small model trained on the same samples under any layout, to compare what comes out.

The real engine, 20 steps; the schedule warms up, so that no step amplifies rounding.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tests.distributed.launch import run_on_ranks

STEPS, BATCH, SEQUENCE, VOCABULARY = 20, 8, 32, 500
DIGITS = 5
BF16_LOSS, BF16_NORM = 3e-3, 8e-3  # bf16 rounds each product to 3 digits; measured 7e-4 and 3.8e-3


def samples(step: int) -> np.ndarray:
    """int64 [BATCH, SEQUENCE + 1]; a first-order Markov chain, so that there is something to learn."""
    random = np.random.default_rng(step)
    rows = np.empty((BATCH, SEQUENCE + 1), dtype=np.int64)
    rows[:, 0] = random.integers(VOCABULARY, size=BATCH)
    for place in range(SEQUENCE):
        rows[:, place + 1] = (7 * rows[:, place] + random.integers(3, size=BATCH)) % VOCABULARY
    return rows


class Run(NamedTuple):
    """What one layout did.

    Attributes:
        lines: [loss, gradient norm] of every step.
        seconds: wall time, building the model included.
        loads: of a mixture of experts, a `LayerLoad` a layer over all steps.
        watched: what `watch` saw.
    """

    lines: list[list[float]]
    seconds: float
    loads: list[dict[str, Any]]
    watched: list[Any]


def run_layouts(world: int, layouts: dict[str, dict[str, Any]], **keywords: Any) -> dict[str, Run]:
    """Every layout, one after the other, on the same `world` processes.

    Args:
        layouts: name -> sizes tp, pp, cp, ep (default 1), zero (0), sp (False), kind (p2p), micro (all of a rank's
            part of the batch), recompute (none), precision (fp32), layers (by parameters), offload ({}: what of
            DeepSpeed's to where), json ({}: zero_optimization of a DeepSpeed JSON), training ({}: other keys of it).
        keywords: untied, num_layers, model (other fields of the model), documents (samples are packed with several),
            steps, optimizer (keys of its section), and watch: "module:class" of an object made of the engine that is
            called before every update and returns what it sees.
    """
    results = run_on_ranks("tests.distributed.parity:train", world, timeout=280, layouts=layouts, **keywords)[0]
    return {name: Run(**run) for name, run in results.items()}


def train(
    layouts: dict[str, dict[str, Any]],
    untied: bool = False,
    num_layers: int = 2,
    model: dict[str, Any] | None = None,
    documents: bool = False,
    steps: int = STEPS,
    watch: str = "",
    optimizer: dict[str, Any] | None = None,
) -> dict[str, dict[str, Any]]:
    """What one rank does for `run_layouts`."""
    import torch
    import torch.distributed as dist
    from megatron.core import parallel_state

    from minicpm_megatron.data.sampling import batch
    from minicpm_megatron.engine.build import build_engine, build_model
    from minicpm_megatron.methods.schedules import build_schedule
    from minicpm_megatron.model.config import MiniCPMConfig
    from minicpm_megatron.model.initialize import initialize_parameters
    from minicpm_megatron.parallel import device, groups
    from minicpm_megatron.parallel.zigzag import zigzag
    from minicpm_megatron.recipe import BatchPlan, build
    from minicpm_megatron.training.expert_load import take_loads

    def part(whole: torch.Tensor) -> torch.Tensor:
        return zigzag(whole, case.get("cp", 1), parallel_state.get_context_parallel_rank(), dim=1).contiguous()

    def micro_batch(indices: Any, rows: Any) -> tuple[torch.Tensor, ...]:
        both = torch.from_numpy(rows)
        wholes = [both[:, :-1], both[:, 1:]]
        if documents:  # of 5 to 9 tokens, others in each row
            lengths = torch.from_numpy(5 + indices % 5)[:, None]
            places = torch.arange(SEQUENCE)
            wholes.append(places - places % lengths)
        return tuple(part(whole).to(device.device()) for whole in wholes)

    world = int(os.environ["WORLD_SIZE"])
    module_name, _, class_name = watch.partition(":")
    results = {}
    for name, case in layouts.items():
        began = time.perf_counter()
        tensor_parallel, precision = case.get("tp", 1), case.get("precision", "fp32")
        replicas = world // (tensor_parallel * case.get("pp", 1) * case.get("cp", 1))
        recipe = build(
            {
                "name": "parity",
                "preset": "minicpm-nano",
                "model": {
                    "vocab_size": VOCABULARY,
                    "dim_model_base": 64,
                    "num_layers": num_layers,
                    "untie_embeddings_and_output_weights": untied,
                    **(model or {}),
                },
                "data": {"train": [{"prefix": "unused"}], "sequence_length": SEQUENCE},
                "parallel": {
                    "tensor_model_parallel_size": tensor_parallel,
                    "sequence_parallel": case.get("sp", False),
                    "pipeline_model_parallel_size": case.get("pp", 1),
                    "context_parallel_size": case.get("cp", 1),
                    "cp_comm_type": case.get("kind", "p2p"),
                    "expert_model_parallel_size": case.get("ep", 1),
                    "pipeline_layers": case.get("layers"),
                },
                "training": {
                    "global_batch_size": BATCH,
                    "micro_batch_size": case.get("micro", BATCH // replicas),
                    "precision": precision,
                    "recompute": case.get("recompute", "none"),
                    **case.get("training", {}),
                },
                "optimizer": {"lr": 0.002, **(optimizer or {})},
                "schedule": {"warmup": 10, "total": STEPS, "decay": 5, "decay_shape": "linear"},
                "deepspeed": {"zero_stage": case.get("zero", 0), "config": _json(case), **case.get("offload", {})},
            }
        )
        layout = recipe.check_world_size(world)
        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        groups.initialize(layout, init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")
        config = MiniCPMConfig.from_recipe(recipe)
        module = build_model(config, recipe)
        initialize_parameters(module, config, seed=3)
        engine = build_engine(module, config, recipe, layout)
        schedule, plan = build_schedule(recipe.schedule), BatchPlan(recipe)
        engine.train()
        watcher = getattr(importlib.import_module(module_name), class_name)(engine) if watch else None
        lines, watched = [], []
        for step in range(steps):
            engine.set_rates(schedule.factor(plan.position(step)))
            rows = samples(step)
            mine = batch(0, BATCH, parallel_state.get_data_parallel_rank(), replicas, recipe.training.micro_batch_size)
            total = engine.accumulate((micro_batch(indices, rows[indices]) for indices in mine), len(mine))
            if watcher is not None:
                watched.append(watcher())
            update = engine.step()
            dist.all_reduce(total)
            lines.append([float(total) / world, update.gradient_norm])
        loads = [asdict(load) for load in take_loads(engine.module, config)]
        results[name] = Run(lines, time.perf_counter() - began, loads, watched)._asdict()
    return results


def _json(case: dict[str, Any]) -> str | None:
    if "json" not in case:
        return None
    path = f"{os.environ['MINICPM_TEST_STORE']}.{os.environ['RANK']}.json"
    Path(path).write_text(json.dumps({"zero_optimization": case["json"]}))
    return path


def digits(first: float, second: float) -> float:
    """Leading decimal digits in which two numbers agree."""
    return 16.0 if first == second else -math.log10(abs(first - second) / abs(first))


def agreement(reference: list[list[float]], other: list[list[float]]) -> float:
    """Fewest digits of any loss or gradient norm."""
    return min(digits(a, b) for one, two in zip(reference, other, strict=True) for a, b in zip(one, two, strict=True))


class Apart(NamedTuple):
    """Largest relative differences over all steps."""

    loss: float
    norm: float

    @property
    def as_bf16_may_be(self) -> bool:
        """Whether bf16 explains them."""
        return self.loss < BF16_LOSS and self.norm < BF16_NORM


def furthest(reference: list[list[float]], other: list[list[float]]) -> Apart:
    """How far a run in bf16 is from one in fp32."""
    columns = zip(zip(*reference, strict=True), zip(*other, strict=True), strict=True)
    return Apart(*(max(abs(a - b) / a for a, b in zip(one, two, strict=True)) for one, two in columns))
