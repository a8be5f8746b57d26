"""Every attention kernel of ours against the reference, and the reference against attention pair by pair."""

from __future__ import annotations

import math

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType

from minicpm_megatron.errors import UserError
from minicpm_megatron.model.attention import MiniCPMCoreAttention
from minicpm_megatron.model.attention_kernel import as_kernel
from minicpm_megatron.model.attention_kernels.reference import reference
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.recipe import build, recipe_hash
from minicpm_megatron.registry import ATTENTION_KERNELS
from tests.model.attention_contract import (
    BATCH,
    CHANNELS,
    LENGTH,
    SCALE,
    check_attention_kernel,
    starts,
    tensors,
    ways,
    whole_mask,
)
from tests.recipe.fields import minimal_fields


@pytest.mark.parametrize("name", ATTENTION_KERNELS.names())
def test_every_kernel(name: str) -> None:
    check_attention_kernel(name)


@pytest.mark.parametrize("way", ["causal", "documents", "mask", "all"])
def test_the_reference_is_attention_pair_by_pair(way: str) -> None:
    query, key, value, _ = (tensor.double().cpu() for tensor in tensors(6, 2, torch.float32))
    found = reference(
        *(tensor.double() for tensor in tensors(6, 2, torch.float32)[:3]), scale=SCALE, **ways()[way]
    ).cpu()
    begins, hidden = starts().cpu(), whole_mask().cpu()
    for i, row, head in ((0, 0, 0), (5, 1, 3), (11, 0, 2), (12, 0, 5), (13, 0, 4), (36, 0, 1), (36, 1, 5)):
        group = head // 3  # six heads share two groups
        visible = {
            "causal": range(i + 1),
            "documents": range(int(begins[row, i]), i + 1),
            "mask": (~hidden[row, 0, i]).nonzero().flatten().tolist(),
            "all": range(LENGTH),
        }
        keys = list(visible[way])
        weights = [math.exp(SCALE * float(query[i, row, head] @ key[j, row, group])) for j in keys]
        for channel in (0, CHANNELS - 1):
            terms = (weight * float(value[j, row, group, channel]) for weight, j in zip(weights, keys, strict=True))
            assert float(found[i, row, head, channel]) == pytest.approx(sum(terms) / sum(weights), rel=1e-12, abs=1e-12)
    assert found.shape == (LENGTH, BATCH, 6, CHANNELS)


def test_the_core_calls_the_kernel_that_the_recipe_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ATTENTION_KERNELS, "_entries", dict(ATTENTION_KERNELS._entries))
    asked = []

    def kernel(query, key, value, **options):
        asked.append(options)
        return query

    ATTENTION_KERNELS.add("noted", kernel)
    recipe = build(minimal_fields(training__attention_kernel="noted"))
    core = MiniCPMCoreAttention(MiniCPMConfig.from_recipe(recipe), 1, AttnMaskType.causal, "self")
    query, key, value, _ = tensors(4, 2, torch.float32)
    mask = whole_mask()
    assert core(query, key, value, None).shape == (LENGTH, BATCH, 4 * CHANNELS)
    core(query, key, value, starts())
    core(query, key, value, mask)
    core(query[:1], key, value, None, attn_mask_type=AttnMaskType.no_mask)
    given = [(each["causal"], each["starts"] is not None, each["mask"] is mask) for each in asked]
    assert given == [(True, False, False), (True, True, False), (False, False, True), (False, False, False)]
    with pytest.raises(ValueError, match="needs a mask"):
        core(query, key, value, None, attn_mask_type=AttnMaskType.padding)


def test_losses_do_not_depend_on_the_kernel() -> None:
    """Rounding apart, so a run may change it when it resumes."""
    hashes = {recipe_hash(build(minimal_fields(training__attention_kernel=name))) for name in ("auto", "reference")}
    assert hashes == {recipe_hash(build(minimal_fields()))}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"training__attention_kernel": "spda"},
            r"training.attention_kernel: unknown attention kernel 'spda'; did you mean sdpa\?",
        ),
        ({"training__attention_kernel": 3}, "training.attention_kernel: 3 is refused, it must be text"),
        (
            {"training__attention_kernel": "sdpa", "parallel__context_parallel_size": 2},
            "training.attention_kernel: sdpa attends on one rank, .*; set it to auto",
        ),
    ],
)
def test_refused(changes: dict[str, object], line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(minimal_fields(**changes))


@pytest.mark.parametrize("entry", [3, "sdpa", torch.nn.Linear])
def test_what_is_no_kernel(entry: object) -> None:
    with pytest.raises(TypeError, match="an attention kernel must be a function, not"):
        as_kernel(entry)
