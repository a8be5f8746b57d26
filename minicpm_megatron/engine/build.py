"""The model and the engine that a layout wants: whole copies, or a pipeline of stages."""

from __future__ import annotations

import torch

from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.engine.pipeline import PipelinedEngine, build_pipeline
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.model import MiniCPMModel
from minicpm_megatron.recipe import Layout, Recipe


def build_model(config: MiniCPMConfig, recipe: Recipe) -> torch.nn.Module:
    """This rank's part of the model, its weights not yet set."""
    if config.pipeline_model_parallel_size > 1:
        return build_pipeline(config, recipe)
    return MiniCPMModel(config)


def build_engine(model: torch.nn.Module, config: MiniCPMConfig, recipe: Recipe, layout: Layout) -> Engine:
    """The engine for what `build_model` made."""
    kind = PipelinedEngine if config.pipeline_model_parallel_size > 1 else Engine
    return kind(model, config, recipe, layout)
