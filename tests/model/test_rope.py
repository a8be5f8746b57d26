"""Our model with scaled RoPE against stock transformers, below and beyond the context it was trained on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.convert.conftest import random_tensors, small_model
from tests.device import put
from tests.distributed.launch import run_on_ranks

ORIGINAL = 32
LENGTHS = (8, ORIGINAL, ORIGINAL + 1, 2 * ORIGINAL, 4 * ORIGINAL)
SCALINGS: dict[str, dict[str, Any]] = {
    "none": {"max_position_embeddings": 4 * ORIGINAL},
    "abf": {"max_position_embeddings": 4 * ORIGINAL, "rotary_base": 1e6},
    "ntk": {"max_position_embeddings": 4 * ORIGINAL, "rope_scaling": {"type": "ntk", "factor": 4.0}},
    "product": {"max_position_embeddings": 4 * ORIGINAL, "rope_scaling": {"type": "product", "factor": 4.0}},
    "dynamic": {"max_position_embeddings": ORIGINAL, "rope_scaling": {"type": "dynamic", "factor": 4.0}},
}


def _ours(scaling: str) -> Any:
    import minicpm_megatron as library
    from minicpm_megatron.model.sharding import named_shards

    shape = small_model(**SCALINGS[scaling])
    config = library.MiniCPMConfig.from_recipe(shape)
    model, tensors = library.MiniCPMModel(config), random_tensors(shape)
    with torch.no_grad():
        for name, parameter, spec in named_shards(model, config):
            parameter.copy_(spec.take(tensors[name], tuple(parameter.shape)))
    return model


def _tokens(length: int) -> torch.Tensor:
    return torch.randint(400, (2, length), generator=torch.Generator().manual_seed(length))


def logits_apart() -> dict[str, float]:
    """Largest |logit difference| / |logit| to each published format, by scaling and length."""
    from transformers import AutoModelForCausalLM

    from minicpm_megatron.convert import convert
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout
    from minicpm_megatron.storage.sharded import write_single

    groups.initialize(Layout(1, 1, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")
    found = {}
    for scaling, changes in SCALINGS.items():
        ours = _ours(scaling)
        plain = _ours("none")
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            shape, folder = small_model(**changes), Path(scratch)
            write_single(folder / "ours", random_tensors(shape).items(), shape.model_dump(mode="json"), {"step": 0})
            for target in ("granite", "llama"):
                convert(folder / "ours", folder / target, target, dtype="fp32")
                for length in LENGTHS:
                    # anew for each length: transformers' dynamic scaling remembers the longest it has seen
                    stock = AutoModelForCausalLM.from_pretrained(folder / target, dtype=torch.float32)
                    tokens = _tokens(length)
                    theirs = stock(tokens).logits
                    apart = (ours(put(tokens))[..., :400].cpu() - theirs).abs().max() / theirs.abs().max()
                    found[f"{scaling} {target} {length}"] = float(apart)
            # longest first: what was computed before must not matter
            for length in sorted(LENGTHS, reverse=True):
                tokens = put(_tokens(length))
                change = (ours(tokens) - plain(tokens)).abs().max() / plain(tokens).abs().max()
                found[f"{scaling} unlike none {length}"] = float(change)
    return found


@pytest.fixture(scope="module")
def apart() -> dict[str, float]:
    return run_on_ranks("tests.model.test_rope:logits_apart", 1)[0]


@pytest.mark.parametrize("target", ["granite", "llama"])
@pytest.mark.parametrize("scaling", SCALINGS)
def test_stock_transformers_computes_the_same(scaling: str, target: str, apart: dict[str, float]) -> None:
    rows = [apart[f"{scaling} {target} {length}"] for length in LENGTHS]
    print(f"{scaling} {target}: {[f'{row:.1e}' for row in rows]}")
    assert max(rows) < 2e-5, rows


@pytest.mark.parametrize("scaling", [name for name in SCALINGS if name != "none"])
def test_the_comparison_sees_the_scaling(scaling: str, apart: dict[str, float]) -> None:
    for length in LENGTHS:
        changed = apart[f"{scaling} unlike none {length}"]
        if scaling == "dynamic" and length <= ORIGINAL:
            assert changed == 0.0  # in every bit
        else:
            # one token beyond the context the dynamic base grows by 13 %
            assert changed > 100 * 2e-5, length


def stage_apart() -> list[float]:
    """Largest differences of the pipeline's list of modules to the whole model, under dynamic scaling."""
    import minicpm_megatron as library
    from minicpm_megatron.model.pipeline import PipelineEmbedding, PipelineFinalNorm, PipelineLayer
    from minicpm_megatron.parallel import groups
    from minicpm_megatron.recipe import Layout

    groups.initialize(Layout(1, 1, 1, 1, 1, 1, (1,)), init_method=f"file://{os.environ['MINICPM_TEST_STORE']}")
    whole = _ours("dynamic")
    config = library.MiniCPMConfig.from_recipe(small_model(**SCALINGS["dynamic"]))
    parts = [
        PipelineEmbedding(config),
        *(PipelineLayer(config, number + 1) for number in range(config.num_layers)),
        PipelineFinalNorm(config),
    ]
    weights = dict(whole.named_parameters())
    with torch.no_grad():
        for part in parts:
            here, there = part.global_prefix
            for name, parameter in part.named_parameters():
                parameter.copy_(weights[there + name.removeprefix(here)])
        found = []
        for length in LENGTHS:
            tokens = states = put(_tokens(length))
            for part in parts:
                states = part(states)
            logits = parts[0].head(states, None).transpose(0, 1)
            found.append(float((logits - whole(tokens)).abs().max()))
    return found


def test_pipeline_modules_compute_what_the_whole_model_does() -> None:
    (found,) = run_on_ranks("tests.model.test_rope:stage_apart", 1)
    assert found == [0.0] * len(LENGTHS)
