"""The model and the engine that a layout wants: whole copies, or a pipeline of stages."""

from __future__ import annotations

import torch

from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.engine.pipeline import PipelinedEngine, build_pipeline
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.model import MiniCPMModel
from minicpm_megatron.model.sharding import mark_tensor_parallel
from minicpm_megatron.recipe import Layout, Recipe


def build_model(config: MiniCPMConfig, recipe: Recipe) -> torch.nn.Module:
    """Build this rank's part of the model, whose weights the caller must set.

    The weights come from `initialize_parameters` or from a checkpoint. What Megatron-Core itself draws is thrown away;
    with perform_initialization=False in the config it draws nothing.
    """
    model = build_pipeline(config, recipe) if config.pipeline_model_parallel_size > 1 else MiniCPMModel(config)
    # Megatron-Core marks split parameters only where it draws them
    mark_tensor_parallel(model)
    return model


def build_engine(model: torch.nn.Module, config: MiniCPMConfig, recipe: Recipe, layout: Layout) -> Engine:
    """The engine for what `build_model` made."""
    kind = PipelinedEngine if config.pipeline_model_parallel_size > 1 else Engine
    return kind(model, config, recipe, layout)
