"""One transformer layer of MiniCPM-2.4B, forward and backward: time and TFLOP/s, as it is and under torch.compile.

    python -m benchmarks.gpu_layer --device cuda
    python -m benchmarks.gpu_layer --samples 1 --length 64 --preset minicpm-nano       # on the CPU

The layer is `MiniCPMTransformerLayer` from the spec, bf16, with its own gradients. FLOPs are 6 for every weight and
token, and the attention core counted as if it were not causal (PaLM, appendix B). After each way comes a line of JSON
with all that is known.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.model import MiniCPMModel
from minicpm_megatron.parallel import device, groups
from minicpm_megatron.recipe import Layout, get_preset
from minicpm_megatron.recipe.flops import attention_flops_per_token
from minicpm_megatron.recipe.parameters import count_parameters


def build(preset: str) -> tuple[torch.nn.Module, Callable[[int], torch.Tensor]]:
    """A layer in bf16 on the device, and its rotary angles for a length."""
    shape = get_preset(preset).model_copy(update={"num_layers": 1, "vocab_size": 128})
    groups.initialize(Layout(1, 1, 1, 1, 1, 1, (1,)))
    model = MiniCPMModel(MiniCPMConfig.from_recipe(shape, precision="bf16"))
    return model.decoder.layers[0].train(), model.rotary_pos_emb


def measure(step: Callable[[], None], rounds: int) -> tuple[float, float, float]:
    """(seconds of the first call, median seconds of those after it, GiB at their peak)."""
    first = _seconds(step)
    if not device.on_cpu():
        torch.cuda.reset_peak_memory_stats()
    times = [_seconds(step) for _ in range(rounds)]
    return first, statistics.median(times), device.peak_memory_bytes() / 2**30


def _seconds(step: Callable[[], None]) -> float:
    device.synchronize()
    began = time.perf_counter()
    step()
    device.synchronize()
    return time.perf_counter() - began


def main() -> None:
    """Measure each way and print what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="minicpm-2.4b")
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="what must be there")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    given = parser.parse_args()
    if (given.device == "cpu") != device.on_cpu():
        parser.error(f"--device {given.device}: this machine runs on {device.device().type}")
    layer, rotary = build(given.preset)
    angles = rotary(given.length)
    shape = get_preset(given.preset)
    weights = 6.0 * count_parameters(shape).non_embedding / shape.num_layers
    flops = (weights + attention_flops_per_token(shape, given.length) / shape.num_layers) * given.samples * given.length
    size = (given.length, given.samples, shape.hidden_size)
    states = torch.randn(size, dtype=torch.bfloat16, device=device.device()).requires_grad_()
    gradient = torch.randn_like(states)

    def step_of(module: Callable[..., tuple[torch.Tensor, ...]]) -> Callable[[], None]:
        def step() -> None:
            layer.zero_grad(set_to_none=True)
            states.grad = None
            output, *_ = module(states, attention_mask=None, rotary_pos_emb=angles)
            output.backward(gradient)

        return step

    ways: dict[str, Any] = (
        {"eager": layer} if given.no_compile else {"eager": layer, "torch.compile": torch.compile(layer)}
    )
    found: dict[str, dict[str, float] | str] = {}
    for name, module in ways.items():
        try:
            first, seconds, gib = measure(step_of(module), given.rounds)
        except Exception as error:  # a graph that does not compile is a row of its own
            found[name] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            print(f"{name}: {found[name]}")
            continue
        found[name] = {"first": first, "seconds": seconds, "tflops": flops / seconds / 1e12, "gib": gib}
        print(
            f"{name}: {1e3 * seconds:.2f} ms, {flops / seconds / 1e12:.1f} TFLOP/s, {gib:.2f} GiB, first {first:.1f} s"
        )
    print(json.dumps(found))


if __name__ == "__main__":
    main()
