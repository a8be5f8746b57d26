"""The parts of a step, their extrapolation and their times, against arithmetic."""

from __future__ import annotations

import pytest

from minicpm_megatron.recipe.flops import head_flops_per_token
from minicpm_megatron.recipe.parameters import count_parameters
from minicpm_megatron.recipe.presets import get_preset
from tests.fake_cuda import launch, roofline

MODEL, TOKENS = get_preset("minicpm-2.4b"), 4096


def test_extrapolation_and_time() -> None:
    one, two = ({"operations": n, "bytes": 8 * n, "flops": 10**12 * (n + 1)} for n in (3, 5))
    part = roofline.extrapolate("layers: products", one, two, layers=4)
    assert (part.operations, part.bytes, part.flops) == (9, 72, 10e12)
    assert part.seconds == pytest.approx(10e12 / (0.8 * 989e12))
    moved = roofline.extrapolate("optimizer: AdamW", {**one, "flops": 0}, {**two, "flops": 0}, layers=4)
    assert moved.seconds == pytest.approx(72 / (0.85 * 4.8e12))
    assert roofline.extrapolate("attention", one, two, layers=4).flops == 5e12  # its causal half


@pytest.mark.timeout(900)
@pytest.mark.skipif(launch.missing() is not None, reason=str(launch.missing()))
def test_parts_of_a_step_of_one_sample() -> None:
    parts = {part.name: part for part in roofline.measure(samples=1, micro_batches=1, recompute="none")}
    counted = count_parameters(MODEL)
    norms = (2 * MODEL.num_layers + 1) * MODEL.hidden_size
    assert parts["layers: products"].flops == 6 * TOKENS * (counted.non_embedding - norms)
    assert parts["embedding, head and loss: products"].flops == TOKENS * head_flops_per_token(MODEL)
    # forward 4 s^2 H and backward, which makes the scores once more, 10 s^2 H; half of that is causal
    assert parts["attention"].flops == 7 * TOKENS**2 * MODEL.hidden_size * MODEL.num_layers
    parameters = counted.non_embedding + 122_880 * MODEL.hidden_size
    # reads weight, gradient and two moments, writes all but the gradient, in fp32
    assert parts["optimizer: AdamW"].bytes == pytest.approx(28 * parameters, rel=1e-4)
    assert parts["accumulation of gradients in fp32"].operations == pytest.approx(
        2 * (6 * MODEL.num_layers + 2), rel=0.01
    )
    said = roofline.table(list(parts.values()), TOKENS)
    assert said.count("\n| ") == len(parts) + 2 and "tokens/s" in said
