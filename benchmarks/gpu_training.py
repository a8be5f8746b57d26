"""Training steps on one device: tokens/s, utilisation, and peak memory against the plan.

    python -m benchmarks.gpu_training --preset minicpm-2.4b --device cuda
    python -m benchmarks.gpu_training --preset minicpm-nano --samples 2 --length 16        # on the CPU

bf16 under ZeRO 1, steps of `--samples` random sequences through `engine.Engine`, as the trainer takes them. The
micro-batch is the largest that divides them and that the plan puts into 90 % of the device's memory. Utilisation is
model FLOP/s over the stated dense bf16 peak: 6 for every weight that multiplies a token, and the attention core counted
as if it were not causal (PaLM, appendix B). The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch

from minicpm_megatron.engine.build import build_engine, build_model
from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.sharding import mark_tensor_parallel
from minicpm_megatron.parallel import device, groups
from minicpm_megatron.recipe import Recipe, build, count_parameters
from minicpm_megatron.recipe.flops import flops_per_token
from minicpm_megatron.recipe.memory import estimate_memory
from minicpm_megatron.training import guards
from minicpm_megatron.training.flops import device_peak

WARMUP = 2  # steps: kernels are compiled and chosen, Adam's moments made
FILL = 0.9  # of the device's memory
GIB = 2**30


def recipe_of(given: argparse.Namespace, micro_batch: int) -> Recipe:
    """The recipe of a run with this micro-batch, all else at its defaults."""
    return build(
        {
            "name": "gpu",
            "preset": given.preset,
            "data": {"train": [{"prefix": "unread"}], "sequence_length": given.length},
            "training": {
                "global_batch_size": given.samples,
                "micro_batch_size": micro_batch,
                "precision": "bf16",
                "recompute": given.recompute,
            },
            "schedule": {"shape": "constant", "total": 1000},
            "deepspeed": {"zero_stage": given.zero_stage},
        }
    )


def largest_that_fits(given: argparse.Namespace) -> Recipe:
    """The recipe with the largest micro-batch whose plan fits the device; with the smallest where none does."""
    whole = None if device.on_cpu() else FILL * torch.cuda.mem_get_info()[1]
    sizes = [size for size in range(given.samples, 0, -1) if given.samples % size == 0]
    for size in sizes:
        recipe = recipe_of(given, size)
        if whole is None or estimate_memory(recipe, recipe.check_world_size(1)).total < whole:
            return recipe
    return recipe_of(given, 1)


def build_run(recipe: Recipe) -> Engine:
    """An engine whose weights are drawn on the device: their values do not matter, and drawing them there is faster."""
    layout = recipe.check_world_size(1)
    groups.initialize(layout)
    config = MiniCPMConfig.from_recipe(
        recipe.model, recipe.parallel, precision="bf16", recompute=recipe.training.recompute
    )
    model = build_model(config, recipe)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1.0) if parameter.dim() == 1 else parameter.normal_(0.0, 0.02)
    mark_tensor_parallel(model)
    engine = build_engine(model, config, recipe, layout)
    engine.train()
    return engine


class Clock:
    """Seconds of the parts of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self._last = 0.0

    def start(self) -> None:
        device.synchronize()
        self._last = time.perf_counter()

    def lap(self, part: str) -> None:
        """Count what has passed since `start` or the last lap to `part`."""
        device.synchronize()
        now = time.perf_counter()
        self.parts.setdefault(part, []).append(now - self._last)
        self._last = now


def train(engine: Engine, recipe: Recipe, steps: int) -> tuple[Clock, float]:
    """Times of `steps` steps after the warm-up, and the last loss."""
    shape = (recipe.training.global_batch_size, recipe.data.sequence_length + 1)
    rows = torch.randint(recipe.model.vocab_size, shape, device=device.device())
    micro = rows.split(recipe.training.micro_batch_size)
    batches = [(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in micro]
    clock, loss = Clock(), 0.0
    for step in range(WARMUP + steps):
        if step == WARMUP:
            clock = Clock()
            if not device.on_cpu():
                torch.cuda.reset_peak_memory_stats()
        clock.start()
        engine.set_rates(1e-3)
        total = engine.accumulate(batches, len(batches))
        clock.lap("forward and backward")
        loss = guards.exchange(total, stop=False, saved=False).loss
        assert engine.step().applied
        clock.lap("update")
    return clock, loss


def main() -> None:
    """Print what was measured, and all as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minicpm-2.4b")
    parser.add_argument("--samples", type=int, default=8, help="of a step")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--zero-stage", type=int, choices=range(4), default=1)
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what must be there")
    given = parser.parse_args()
    if (given.device == "cpu") != device.on_cpu():
        parser.error(f"--device {given.device}: this machine runs on {device.device().type}")
    device.prepare()
    recipe = largest_that_fits(given)
    engine = build_run(recipe)
    clock, loss = train(engine, recipe, given.steps)
    seconds = statistics.median(map(sum, zip(*clock.parts.values(), strict=True)))
    tokens = given.samples * given.length
    flops = tokens * flops_per_token(recipe.model, given.length) / seconds
    planned = estimate_memory(recipe, recipe.check_world_size(1)).total
    found: dict[str, Any] = {
        "parameters": count_parameters(recipe.model).total,
        "micro_batch": recipe.training.micro_batch_size,
        "seconds": seconds,
        "parts": {part: statistics.median(times) for part, times in clock.parts.items()},
        "tokens_per_second": tokens / seconds,
        "tflops": flops / 1e12,
        "utilisation": flops / device_peak("bf16").flops,
        "peak_gib": device.peak_memory_bytes() / GIB,
        "planned_gib": planned / GIB,
        "loss": loss,
    }
    print(
        f"{given.preset}: {1e3 * seconds:.1f} ms a step of {tokens:,} tokens, micro-batches of {found['micro_batch']},"
        f" {found['tokens_per_second']:,.0f} tokens/s, {100 * found['utilisation']:.1f} % of the peak,"
        f" {found['peak_gib']:.1f} GiB where {found['planned_gib']:.1f} are planned"
    )
    print(json.dumps(found))
    groups.destroy()


if __name__ == "__main__":
    main()
