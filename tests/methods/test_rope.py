"""Bases of scaled RoPE: against transformers' own rotary code, and against what each formula promises."""

from __future__ import annotations

import doctest
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from minicpm_megatron.methods import rope
from minicpm_megatron.recipe import RopeScaling, get_preset

ORIGINAL = 4096


def config(channels: int, parameters: dict[str, Any]) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * channels,
        num_attention_heads=4,
        head_dim=channels,
        max_position_embeddings=ORIGINAL,
        rope_parameters=parameters,
    )


def frequencies(base: float, channels: int) -> torch.Tensor:
    """base^(-2i/d) in fp64."""
    return torch.tensor([base ** (-2 * i / channels) for i in range(channels // 2)], dtype=torch.float64)


def test_the_examples_in_the_docstrings() -> None:
    done = doctest.testmod(rope)
    assert done.attempted >= 6 and not done.failed


@pytest.mark.parametrize("channels", [4, 16, 64, 128])
@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0, 7.5])
@pytest.mark.parametrize("length", [1, ORIGINAL - 1, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL, 5 * ORIGINAL + 3])
def test_dynamic_is_transformers_formula(channels: int, factor: float, length: int) -> None:
    theirs, scale = ROPE_INIT_FUNCTIONS["dynamic"](
        config(channels, {"rope_type": "dynamic", "rope_theta": 1e6, "factor": factor}), "cpu", seq_len=length
    )
    base = rope.dynamic_base(1e6, factor, channels, length, ORIGINAL)
    assert scale == 1.0
    torch.testing.assert_close(frequencies(base, channels), theirs.double(), rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("formula", [rope.ntk_base, rope.product_base])
def test_a_scaled_base_is_transformers_default_at_that_base(formula: Any) -> None:
    base = formula(1e6, 4.0, 64)
    embedding = LlamaRotaryEmbedding(config(64, {"rope_type": "default", "rope_theta": base}))
    torch.testing.assert_close(frequencies(base, 64), embedding.inv_freq.double(), rtol=1e-5, atol=0.0)


def test_ntk_is_dynamic_at_the_length_where_its_bracket_is_the_factor() -> None:
    # s n / N - (s - 1) = f  at  n = N (f + s - 1) / s
    assert rope.dynamic_base(1e4, 3.0, 64, 2 * ORIGINAL, ORIGINAL) == pytest.approx(rope.ntk_base(1e4, 4.0, 64))


@pytest.mark.parametrize("channels", [4, 64, 128])
def test_ntk_slows_the_slowest_pair_by_the_factor_and_the_fastest_not_at_all(channels: int) -> None:
    before, after = frequencies(1e4, channels), frequencies(rope.ntk_base(1e4, 8.0, channels), channels)
    assert float(before[0] / after[0]) == 1.0
    assert float(before[-1] / after[-1]) == pytest.approx(8.0)
    assert bool(((before / after).diff() > 0).all())


def test_the_released_model() -> None:
    """Base 1e6, dynamic factor 4 beyond 65,536; and the base its users run, which is no NTK."""
    released = rope.rope_of(get_preset("minicpm-2.4b-128k"))
    assert released.base_at(65_536) == 1e6 < released.base_at(65_537)
    assert released.base_at(131_072) == pytest.approx(1e6 * 5 ** (64 / 62))
    product = rope.product_base(1e6, 4.0, 64)
    assert product == pytest.approx(4129032.26, abs=0.01)
    assert rope.ntk_base(1e6, 4.0, 64) / product == pytest.approx(1.013, abs=1e-3)


@pytest.mark.parametrize("kind", ["none", "ntk", "product"])
def test_only_dynamic_asks_for_the_length(kind: str) -> None:
    model = get_preset("minicpm-2.4b").model_copy(
        update={"rope_scaling": RopeScaling(type=kind, factor=None if kind == "none" else 4.0)}  # type: ignore[arg-type]
    )
    bases = {rope.rope_of(model).base_at(length) for length in (1, 4096, 4097, 10**6)}
    assert len(bases) == 1
    assert (bases == {1e4}) is (kind == "none")
