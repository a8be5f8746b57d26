"""The least time that a step of MiniCPM-2.4B can take on one H200: `python -m tests.fake_cuda.roofline`.

Operations and bytes are counted on the pretended machine at one and two layers, and extrapolated to 40. Assumptions:
every operation reads its arguments from memory and writes its results to it; products run at PRODUCTS of the stated
peak, attention at ATTENTION of it, all else at BANDWIDTH of the memory's stated rate. No time is measured. The host,
kernel launches and communication take no time here.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minicpm_megatron.planning.cluster import GPUS
from minicpm_megatron.recipe.presets import get_preset
from tests.fake_cuda import launch

GPU = GPUS["h200"]  # 989 TFLOP/s dense bf16, 4.8 TB/s
PRODUCTS, ATTENTION, BANDWIDTH = 0.8, 0.6, 0.85
LAYERS = get_preset("minicpm-2.4b").num_layers
SEQUENCE = 4096


@dataclass(frozen=True)
class Part:
    """A part of the step.

    Attributes:
        operations: ATen operations.
        bytes: read and written.
        flops: of products and attention; attention's causal half alone.
        seconds: the longer of arithmetic and memory.
    """

    name: str
    operations: int
    bytes: int
    flops: float
    seconds: float


def extrapolate(name: str, one: Mapping[str, int], two: Mapping[str, int], layers: int = LAYERS) -> Part:
    """A part of a model of `layers` layers from its totals at one and two: {"operations", "bytes", "flops"}."""
    at = {key: one[key] + (layers - 1) * (two[key] - one[key]) for key in one}
    flops, share = (at["flops"] / 2, ATTENTION) if name == "attention" else (float(at["flops"]), PRODUCTS)
    seconds = max(flops / (share * GPU.flops), at["bytes"] / (BANDWIDTH * GPU.memory_bandwidth))
    return Part(name, at["operations"], at["bytes"], flops, seconds)


def measure(samples: int, micro_batches: int, recompute: str) -> list[Part]:
    """The parts of a step at ZeRO 1, longest first."""
    parts: dict[str, Any] = launch.run("run_roofline", str(samples), str(micro_batches), recompute)
    found = [extrapolate(name, *totals) for name, totals in parts.items()]
    return sorted(found, key=lambda part: -part.seconds)


def table(parts: list[Part], tokens: int) -> str:
    """Markdown: a row a part, their sum, and tokens a second with the share of the stated peak."""
    total = Part(
        "all",
        sum(part.operations for part in parts),
        sum(part.bytes for part in parts),
        sum(part.flops for part in parts),
        sum(part.seconds for part in parts),
    )
    lines = ["| part | operations | GB | TFLOP | ms |", "| --- | ---: | ---: | ---: | ---: |"]
    lines += [
        f"| {part.name} | {part.operations:,} | {part.bytes / 1e9:,.1f} | {part.flops / 1e12:,.1f} "
        f"| {1e3 * part.seconds:,.1f} |"
        for part in [*parts, total]
    ]
    used = total.flops / total.seconds / GPU.flops
    lines += ["", f"{tokens / total.seconds:,.0f} tokens/s; {used:.1%} of the stated peak, recomputed FLOPs included"]
    return "\n".join(lines)


def main() -> int:
    """0, or 2 where this machine cannot pretend."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--samples", type=int, default=8, help="of 4,096 tokens in the step (default 8)")
    parser.add_argument("--micro-batches", type=int, default=2, help="of the step (default 2)")
    parser.add_argument("--recompute", choices=("none", "selective", "full"), default="selective")
    arguments = parser.parse_args()
    reason = launch.missing()
    if reason:
        print(f"no roofline: {reason}", file=sys.stderr)
        return 2
    parts = measure(arguments.samples, arguments.micro_batches, arguments.recompute)
    print(table(parts, arguments.samples * SEQUENCE))
    return 0


if __name__ == "__main__":
    sys.exit(main())
