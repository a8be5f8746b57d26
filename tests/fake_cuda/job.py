"""Shared parts of the scripts: a recipe on ranks of which one exists, each case alone, results as a line of JSON."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch._subclasses import FakeTensorMode

from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import Layout, Recipe, build
from tests.fake_cuda import machine, values

SEQUENCE = values.SAMPLE
DEVICE = torch.device("cuda", 0)


class Job(NamedTuple):
    """A recipe, its layout and the model's config, while groups of that layout exist."""

    recipe: Recipe
    layout: Layout
    config: MiniCPMConfig


@contextlib.contextmanager
def started(fields: dict[str, Any], world_size: int, **overrides: Any) -> Iterator[Job]:
    """Join groups as the trainer does, and work on fake tensors until the end of the block.

    Args:
        fields: of the recipe, beside those that are always the same.
        overrides: fields of the model's config.
    """
    common = {
        "name": "fake",
        "data": {"train": [{"prefix": "none"}], "sequence_length": SEQUENCE},
        "optimizer": {"lr": 0.01},
        "schedule": {"shape": "constant", "total": 10},
    }
    machine.join(world_size)
    try:
        recipe = build(common | fields)
        layout = recipe.check_world_size(world_size)
        groups.initialize(layout)
        with FakeTensorMode(allow_non_fake_inputs=True):
            training = recipe.training
            config = MiniCPMConfig.from_recipe(
                recipe.model,
                recipe.parallel,
                precision=training.precision,
                recompute=training.recompute,
                fused_loss=training.fused_loss,
                **overrides,
            )
            yield Job(recipe, layout, config)
    finally:
        groups.destroy()


def run_each[Case](cases: Mapping[str, Case], run: Callable[[Case], dict[str, Any]]) -> None:
    """Print {name: what `run` returns, or {"error": traceback}} of the cases that the command line names, or of all."""
    results = {}
    for name in sys.argv[1:] or cases:
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                results[name] = run(cases[name])
        except Exception as error:
            frames = traceback.format_exception(error, limit=-6)
            results[name] = {"error": "".join(frames)}
    print(json.dumps(results))
