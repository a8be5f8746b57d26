"""What leaves computes what we compute: exports run by stock transformers and by an independent reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minicpm_megatron.convert import FORMATS, convert, open_source
from tests.convert import reference
from tests.convert.conftest import (
    CASES,
    EXPERTS,
    MakeCheckpoint,
    canonical_logits,
    named,
    random_tensors,
    read_checkpoint,
    reference_config,
    small_model,
)

TOLERANCE = 1e-4  # of the largest logit

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"untie_embeddings_and_output_weights": True},
    "one key/value head": {"num_query_groups": 1},
    "no grouping": {"num_query_groups": 8},
    "long base": {"rotary_base": 1e6, "norm_epsilon": 1e-3},
    "standard": {"parametrization": "standard"},
}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    largest = ours.abs().max().item()
    assert 0.5 < largest < 100  # a comparison of numbers that say something
    assert (ours - theirs).abs().max().item() < TOLERANCE * largest


def transformers_logits(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        return model(tokens[None]).logits[0]


def logits_of_an_export(folder: Path, target: str, tokens: torch.Tensor) -> torch.Tensor:
    """By stock transformers, or of what comes back of a format that it does not know."""
    from transformers import CONFIG_MAPPING

    if FORMATS[target].model_type in CONFIG_MAPPING:
        return transformers_logits(folder, tokens)
    convert(folder, folder.parent / "back", "megatron")
    back = folder.parent / "back"
    return canonical_logits(open_source(back).model, read_checkpoint(back), tokens)


# minicpm has a program of its own to agree with, below
@pytest.mark.parametrize(**named([case for case in CASES if case[0] != "minicpm"]))
@pytest.mark.parametrize("variant", VARIANTS)
def test_stock_transformers_agrees(
    variant: str, target: str, kind: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor
) -> None:
    changes = VARIANTS[variant] | kind
    model = small_model(**changes)
    convert(checkpoint(**changes), tmp_path / "out", target, dtype="fp32")
    ours = canonical_logits(model, random_tensors(model), tokens)
    assert_close(ours, logits_of_an_export(tmp_path / "out", target, tokens))


def test_granite_with_its_own_head_width(checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor) -> None:
    model = small_model(kv_channels=16)
    convert(checkpoint(kv_channels=16), tmp_path / "out", "granite", dtype="fp32")
    ours = canonical_logits(model, random_tensors(model), tokens)
    assert_close(ours, transformers_logits(tmp_path / "out", tokens))


@pytest.mark.parametrize("target", [name for name, layout in FORMATS.items() if not layout.rows])
@pytest.mark.parametrize(
    "experts",
    [{"kv_channels": 16}, {"num_moe_experts": 2}, {"num_moe_experts": 9, "moe_router_topk": 4}],
    ids=["its own head width", "all experts", "4 of 9"],
)
def test_mixtures_of_other_shapes(
    experts: dict[str, Any], target: str, checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor
) -> None:
    changes = EXPERTS | experts
    model = small_model(**changes)
    convert(checkpoint(**changes), tmp_path / "out", target, dtype="fp32")
    ours = canonical_logits(model, random_tensors(model), tokens)
    assert_close(ours, transformers_logits(tmp_path / "out", tokens))


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_minicpm_agrees_with_the_reference(
    variant: str, experts: dict[str, Any], checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor
) -> None:
    changes = VARIANTS[variant] | experts
    model = small_model(**changes)
    convert(checkpoint(**changes), tmp_path / "out", "minicpm", dtype="fp32")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    weights = load_file(tmp_path / "out" / "model.safetensors")
    # the multipliers are those of the exported configuration, read by their published names
    theirs = reference.logits(
        reference.published(weights, config),
        config | {"head_dim": config["hidden_size"] // config["num_attention_heads"]},
        tokens,
    )
    assert_close(canonical_logits(model, random_tensors(model), tokens), theirs)


@pytest.mark.parametrize(
    "fault", ["scale_emb", "scale_depth", "dim_model_base", "num_key_value_heads", "num_experts_per_tok"]
)
def test_the_comparison_sees_each_multiplier(fault: str, tokens: torch.Tensor) -> None:
    model = small_model(num_query_groups=4, **EXPERTS)
    config = reference_config(model)
    wrong = config | {fault: config[fault] * 2}
    if fault == "num_key_value_heads":
        wrong[fault] = 2
    weights = random_tensors(model)
    right = reference.logits(reference.canonical(weights, config), config, tokens)
    other = reference.logits(reference.canonical(weights, config), wrong, tokens)
    assert (right - other).abs().max() > 100 * TOLERANCE * right.abs().max()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_precision_exports_run(
    dtype: str, checkpoint: MakeCheckpoint, tmp_path: Path, tokens: torch.Tensor
) -> None:
    model = small_model()
    convert(checkpoint(), tmp_path / "out", "granite", dtype=dtype)
    ours = canonical_logits(model, random_tensors(model), tokens)
    theirs = transformers_logits(tmp_path / "out", tokens)
    # weights rounded once; the loosest bound that a wrong multiplier still breaks
    assert (ours - theirs).abs().max() < 0.1 * ours.abs().max()
