"""One step of MiniCPM-2.4B on one rank, by parts, measured at one and two layers; `roofline` starts this.

Arguments: samples of the step, its micro-batches, and training.recompute.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import torch

from minicpm_megatron.engine.build import build_engine, build_model
from tests.fake_cuda import job, machine, stand_ins, synchronisations
from tests.fake_cuda.counting import Total, Work

PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm"}


class Parts(Work):
    """Work by part of the step, told by the name of the operation and by whose code asks for it."""

    def part(self, name: str) -> str:
        who = _asked_by()
        kind = "products" if name in PRODUCTS else "the rest"
        if "fused_loss" in who or "embedding" in name:
            return f"embedding, head and loss: {kind}"
        if "deepspeed" in who:
            return _part_of_deepspeed(name, who)
        if "attention" in name:
            return "attention"
        return "layers: products" if name in PRODUCTS else "layers: elementwise"


def _part_of_deepspeed(name: str, who: str) -> str:
    if "adam" in name:
        return "optimizer: AdamW"
    if "allreduce" in who:
        return "flattening of gradients for their reduction"
    if "hp_grad" in who and name != "zero_":
        return "accumulation of gradients in fp32"
    return "optimizer: norm, casts, zeroing"


def _asked_by() -> str:
    """`file:function` of the innermost frame of the fused loss, or of DeepSpeed's frames; empty inside the model."""
    found = ""
    for path, function in synchronisations.stack():
        if path.startswith(f"{synchronisations.PROJECT}model"):
            return path if "fused_loss" in path else ""
        if path.startswith(synchronisations.LIBRARIES) and "/deepspeed/" in path:
            found += f"{path}:{function} "
    return found


def step(layers: int, samples: int, micro_batches: int, recompute: str) -> dict[str, Total]:
    """Totals by part of the second step of a model of so many layers."""
    fields = {
        "preset": "minicpm-2.4b",
        "model": {"num_layers": layers},
        "training": {
            "global_batch_size": samples,
            "micro_batch_size": samples // micro_batches,
            "precision": "bf16",
            "recompute": recompute,
        },
        "deepspeed": {"zero_stage": 1},
    }
    with job.started(fields, 1) as (recipe, layout, config):
        engine = build_engine(build_model(config, recipe), config, recipe, layout)
        tokens = torch.zeros(samples // micro_batches, job.SEQUENCE, dtype=torch.int64, device=job.DEVICE)
        for _ in range(2):
            with Parts() as work:
                engine.accumulate([(tokens, tokens)] * micro_batches, micro_batches)
                engine.step()
        return dict(work.parts)


if __name__ == "__main__":
    machine.pretend()
    stand_ins.install()
    counts, recompute = (int(sys.argv[1]), int(sys.argv[2])), sys.argv[3]
    one, two = (step(layers, *counts, recompute) for layers in (1, 2))
    parts = {name: [asdict(each.get(name, Total())) for each in (one, two)] for name in {**one, **two}}
    print(json.dumps(parts))
