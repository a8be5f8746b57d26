"""What to run: YAML and key=value overrides become one validated, frozen `Recipe`.

Imports neither torch, megatron nor deepspeed, so that a mistake in a recipe is found in a fraction of a second.
"""

from __future__ import annotations

from minicpm_megatron.recipe.batches import BatchPlan
from minicpm_megatron.recipe.checks import Layout
from minicpm_megatron.recipe.dump import dump_recipe, recipe_hash
from minicpm_megatron.recipe.load import build, build_saved, build_section, load_recipe
from minicpm_megatron.recipe.parameters import ParameterCounts, count_parameters
from minicpm_megatron.recipe.presets import PRESETS, get_preset
from minicpm_megatron.recipe.schema import (
    BatchGrowth,
    CheckpointRecipe,
    DataRecipe,
    DataSource,
    DeepSpeedRecipe,
    EvaluationRecipe,
    FaultsRecipe,
    GradientStatisticsRecipe,
    LoggingRecipe,
    ModelRecipe,
    OptimizerOptions,
    OptimizerRecipe,
    ParallelRecipe,
    Recipe,
    RopeScaling,
    RunRecipe,
    ScheduleOptions,
    ScheduleRecipe,
    TrainingRecipe,
)

__all__ = [
    "PRESETS",
    "BatchGrowth",
    "BatchPlan",
    "CheckpointRecipe",
    "DataRecipe",
    "DataSource",
    "DeepSpeedRecipe",
    "EvaluationRecipe",
    "FaultsRecipe",
    "GradientStatisticsRecipe",
    "Layout",
    "LoggingRecipe",
    "ModelRecipe",
    "OptimizerOptions",
    "OptimizerRecipe",
    "ParallelRecipe",
    "ParameterCounts",
    "Recipe",
    "RopeScaling",
    "RunRecipe",
    "ScheduleOptions",
    "ScheduleRecipe",
    "TrainingRecipe",
    "build",
    "build_saved",
    "build_section",
    "count_parameters",
    "dump_recipe",
    "get_preset",
    "load_recipe",
    "recipe_hash",
]
