"""Two optimizer steps of `cases.ENGINES`; `launch.run` starts this with the names of cases, or none for all."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from minicpm_megatron.checkpoint.background import Staging
from minicpm_megatron.engine.build import build_engine, build_model
from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.engine.gradient_statistics import ConsecutiveGradients
from minicpm_megatron.engine.state import EngineState
from minicpm_megatron.parallel import device
from minicpm_megatron.training import guards
from minicpm_megatron.training.batches import BatchReader
from minicpm_megatron.training.evaluate import HeldOut, evaluate
from tests.fake_cuda import job, machine, quantities, stand_ins, synchronisations, values
from tests.fake_cuda.cases import ENGINES, EngineCase
from tests.fake_cuda.counting import Work
from tests.fake_cuda.quantities import Quantities

LAYERS, MICRO_BATCHES, SAMPLES = 2, 2, 4


class _Samples:
    """Samples of a training set, all alike."""

    sequence_length = job.SEQUENCE

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        return np.ones(self.sequence_length + 1, np.int64)

    def starts(self, index: int) -> np.ndarray[Any, Any]:
        """They are one document each."""
        return np.zeros(self.sequence_length, np.int64)


def run(case: EngineCase) -> dict[str, Any]:
    """{"counts": of the second step's micro-batches and update; "wrong": what is not on its device, or not done}."""
    batch = case.replicas * MICRO_BATCHES * SAMPLES
    fields = {
        "preset": case.preset,
        "model": {"num_layers": LAYERS},
        "parallel": case.parallel,
        "training": {"global_batch_size": batch, "micro_batch_size": SAMPLES, "precision": case.precision},
        "deepspeed": case.deepspeed,
        "optimizer": case.optimizer,
    }
    # with one rank as users of the library build a model, with more as the trainer does
    with job.started(fields, case.world_size, perform_initialization=case.world_size == 1) as (recipe, layout, config):
        model = build_model(config, recipe)
        if config.num_moe_experts is not None:
            values.route_evenly(model, SAMPLES * job.SEQUENCE * config.moe_router_topk)
        engine = build_engine(model, config, recipe, layout)
        engine.train()
        reader = BatchReader(_Samples(), micro_batch_size=SAMPLES, rank=0, size=case.replicas)
        for _ in range(2):
            counts, wrong = _step(engine, reader.micro_batches(0, batch))
        if case.world_size > 1 and not case.parallel:  # a pipeline's micro-batches always have one size
            wrong += _rest_of_a_run(engine)
        host = case.deepspeed.get("offload_optimizer") == "cpu"
        return {"counts": counts, "wrong": wrong + _elsewhere(engine, host)}


def _step(engine: Engine, batches: Iterator[tuple[torch.Tensor, ...]]) -> tuple[Quantities, list[str]]:
    """One step as the trainer makes it."""
    synchronisations.take()
    with Work() as work:
        loss = engine.accumulate(batches, MICRO_BATCHES)
    counts = quantities.named(f"{MICRO_BATCHES} micro-batches", quantities.of(work, synchronisations.take()))
    with Work() as work:
        guards.exchange(loss, stop=False, saved=False)
        update = engine.step()
    counts |= quantities.named("update", quantities.of(work, synchronisations.take()))
    return counts, [] if update.applied and loss.is_cuda else [f"{update}, loss on {loss.device}"]


def _rest_of_a_run(engine: Engine) -> list[str]:
    """Run the trainer's work beside plain steps: evaluation, gradient statistics, a step refused, a save."""
    batches = engine.layout.world_size * MICRO_BATCHES
    reader = BatchReader(_Samples(), micro_batch_size=1, rank=0, size=engine.layout.world_size)
    evaluate(engine, {"set": HeldOut(reader, samples=batches, label_bytes=None)})
    state = EngineState(engine)
    gradients = ConsecutiveGradients(state)
    applied = []
    for _ in range(2):
        engine.accumulate(reader.micro_batches(0, batches), MICRO_BATCHES)
        gradients.compare()
        gradients.keep()
        applied.append(math.isfinite(engine.gradient_norm()) and engine.step().applied)
    engine.accumulate(reader.micro_batches(0, batches), MICRO_BATCHES)
    engine.discard()
    saved = Staging().copy(state.fragments())
    device.rng_state()
    wrong = [f"the fragment {each.spec} {each.kind} on {each.tensor.device}" for each in saved if each.tensor.is_cuda]
    return wrong + ([] if all(applied) else [f"updates applied: {applied}"]) + ([] if saved else ["nothing to save"])


def _elsewhere(engine: Engine, host: bool) -> list[str]:
    """Which of the model's and the optimizer's tensors lie on the wrong device."""
    kinds: dict[str, list[torch.Tensor]] = {"parameter": list(engine.module.parameters())}
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    masters = list(optimizer.state)
    moments = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    wanted = {"parameter": "cuda", "master": "cpu" if host else "cuda", "moment": "cpu" if host else "cuda"}
    kinds |= {"master": masters, "moment": moments}
    found = {(kind, tensor.device.type) for kind, tensors in kinds.items() for tensor in tensors}
    missing = [f"no {kind}" for kind, tensors in kinds.items() if not tensors]
    return missing + [f"a {kind} on {place}" for kind, place in sorted(found) if place != wanted[kind]]


if __name__ == "__main__":
    machine.pretend()
    stand_ins.install()
    job.run_each(ENGINES, run)
