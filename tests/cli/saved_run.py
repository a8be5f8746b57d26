"""A checkpoint as a run leaves it, for tools that make another run of it, and what such a tool takes and leaves."""

from __future__ import annotations

import gc
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from minicpm_megatron.convert import rewriting
from minicpm_megatron.recipe import build
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.storage.sharded import Fragment, ShardSpec, write_fragments
from tests.convert.conftest import random_tensors, small_model
from tests.processes.client import run_call

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


def watch_memory(patch: pytest.MonkeyPatch) -> list[int]:
    """Fills with the bytes of all tensors, beyond those there are now, while each file of a checkpoint is written."""
    peaks: list[int] = []

    def live_bytes() -> int:
        storages = {}
        for thing in gc.get_objects():
            if torch.is_tensor(thing):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
        return sum(storages.values())

    def watched(path: Path, fragments: Any, rank_tensors: Any) -> Any:
        pieces = list(fragments)
        peaks.append(live_bytes() - before)
        return write_fragments(path, pieces, rank_tensors)

    gc.collect()
    gc.freeze()  # what is there now is looked through no more, which are all objects of the libraries
    before = live_bytes()
    patch.setattr(rewriting, "write_fragments", watched)
    return peaks


def killed_in_the_middle(script: str, *arguments: object) -> int:
    """Exit status of tools/SCRIPT that is killed before it writes the fifth file."""
    words = [str(argument) for argument in arguments]
    return run_call("tests.cli.saved_run:run_and_be_killed", script=script, arguments=words).returncode


def run_and_be_killed(script: str, arguments: list[str]) -> None:
    """What its process does."""
    write, count = rewriting.write_fragments, 0

    def killed(path: Path, fragments: Any, rank_tensors: Any) -> Any:
        nonlocal count
        count += 1
        if count == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return write(path, fragments, rank_tensors)

    rewriting.write_fragments = killed
    sys.argv = [script, *arguments]
    runpy.run_path(f"tools/{script}", run_name="__main__")
