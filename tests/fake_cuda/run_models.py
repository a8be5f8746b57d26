"""Forward and backward of `cases.MODELS`; `launch.run` starts this with the names of cases, or none for all."""

from __future__ import annotations

from typing import Any

import torch

from minicpm_megatron.engine.build import build_model
from minicpm_megatron.model.experts import set_auxiliary_loss_scale
from tests.fake_cuda import job, machine, quantities, stand_ins, synchronisations, values
from tests.fake_cuda.cases import MODELS, ModelCase
from tests.fake_cuda.counting import Work
from tests.fake_cuda.quantities import Quantities


def run(case: ModelCase) -> dict[str, Any]:
    """{"counts": of a layer and of all else, forward and backward; "wrong": parameters without a gradient on CUDA}."""
    one, two = (_forward_and_backward(case, layers) for layers in (1, 2))
    counts: Quantities = {}
    for number, what in enumerate(("forward", "backward")):
        counts |= quantities.per_layer(what, one[0][number], two[0][number])
    return {"counts": counts, "wrong": one[1] + two[1]}


def _forward_and_backward(case: ModelCase, layers: int) -> tuple[list[Quantities], list[str]]:
    fields = {
        "preset": case.preset,
        "model": {"num_layers": layers},
        "parallel": case.parallel,
        "training": {"global_batch_size": case.world_size, "micro_batch_size": 1, "precision": "bf16"} | case.training,
    }
    with job.started(fields, case.world_size) as (recipe, _, config):
        model = build_model(config, recipe).train()
        if config.num_moe_experts is not None:
            set_auxiliary_loss_scale(1.0, job.DEVICE)  # as the engine does
            values.route_evenly(model, job.SEQUENCE * config.moe_router_topk)
        length = job.SEQUENCE // config.context_parallel_size
        tokens = torch.zeros(1, length, dtype=torch.int64, device=job.DEVICE)
        values.documents = case.documents
        starts = torch.zeros_like(tokens) if case.documents else None
        counts = []
        synchronisations.take()
        with Work() as work:
            loss = model(tokens, attention_mask=starts, labels=tokens).mean()
        counts.append(quantities.of(work, synchronisations.take()))
        with Work() as work:
            loss.backward()
        counts.append(quantities.of(work, synchronisations.take()))
        weights = model.named_parameters()
        return counts, [name for name, weight in weights if weight.grad is None or not weight.grad.is_cuda]


if __name__ == "__main__":
    machine.pretend()
    stand_ins.install()
    job.run_each(MODELS, run)
