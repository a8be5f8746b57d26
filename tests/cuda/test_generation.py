"""Text and losses on a GPU, in the bf16 that generation uses there, against the CPU in fp32."""

from __future__ import annotations

import pytest
import torch

from minicpm_megatron.convert.generation import Generator
from tests.convert.conftest import EXPERTS, canonical_logits, random_tensors, small_model

pytestmark = pytest.mark.gpu_only


@pytest.mark.parametrize("kind", [{}, EXPERTS], ids=["dense", "experts"])
def test_logits_and_losses_are_the_references_but_for_bf16(kind, checkpoint, tokenizer) -> None:
    generator = Generator(checkpoint(**kind), tokenizer)
    assert (generator.model.device.type, generator.model.dtype) == ("cuda", torch.bfloat16)
    tokens = torch.randint(400, (40,), generator=torch.Generator().manual_seed(1))
    shape = small_model(**kind)
    expected = canonical_logits(shape, random_tensors(shape), tokens)
    found = generator.logits(tokens.tolist(), len(tokens))
    assert found.device.type == "cpu" and found.dtype == torch.float32
    # weights and activations rounded to 8 bits; a wrong multiplier is further off
    assert float((found - expected).abs().max()) < 0.1 * float(expected.abs().max())
    losses = generator.losses(tokens.tolist())
    exact = torch.nn.functional.cross_entropy(expected[:-1], tokens[1:], reduction="none")
    assert float((losses - exact).abs().mean()) < 0.05
