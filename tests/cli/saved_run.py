"""A checkpoint as a run leaves it, for tools that make another run of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from minicpm_megatron.recipe import build
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.storage.sharded import Fragment, ShardSpec, write_fragments
from tests.convert.conftest import random_tensors, small_model

MOMENTS = ("exp_avg", "exp_avg_sq")


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A checkpoint as a run saves it at step 30: a recipe, moments, random state, two ranks that share the tensors."""
    model = small_model(num_layers=2)
    recipe = build(
        {
            "name": "dense",
            "model": model.model_dump(mode="json"),
            "data": {"train": [{"prefix": "data/train"}], "sequence_length": 32},
            "training": {"global_batch_size": 8, "micro_batch_size": 2},
            "schedule": {"total": 100, "warmup": 5, "decay": 10, "decay_shape": "linear"},
            "evaluation": {"interval": 10},
            "run": {"directory": str(tmp_path / "runs")},
        }
    )
    folder = tmp_path / "runs" / "dense" / "checkpoints" / "step-30"
    folder.mkdir(parents=True)
    fragments: tuple[list[Fragment], list[Fragment]] = ([], [])
    for number, kind in enumerate(("param", *MOMENTS)):
        for name, tensor in random_tensors(model, seed=number).items():
            flat, half = tensor.abs().view(-1) if number else tensor.view(-1), tensor.numel() // 2
            spec = ShardSpec(name, tuple(tensor.shape))
            fragments[0].append(Fragment(spec, kind, 0, flat[:half]))
            fragments[1].append(Fragment(spec, kind, half, flat[half:]))
    files = [
        write_fragments(folder / f"rank-{rank:05}.safetensors", part, {"cpu": torch.tensor([rank, 7])})
        for rank, part in enumerate(fragments)
    ]
    state = {
        "step": 30,
        "samples": 240,
        "tokens": 7680,
        "updates": 29,
        "origin": None,
        "rates": {"embedding": 0.01, "hidden": 0.01 / 2.4, "vector": 0.01},
        "evaluation_due": False,
        "fault": None,
        "faults": {"offset": 8},
    }
    facts = {
        "model": model.model_dump(mode="json"),
        "recipe": recipe.model_dump(mode="json"),
        "layout": {"zero_stage": 1},
        "data": {"data/train": "fingerprint"},
    }
    write_manifest(folder, files, state=state, facts=facts)
    return folder
