"""The samples of a run as this rank reads them: training and held-out sets."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.batches import BatchReader
from minicpm_megatron.training.evaluate import HeldOut
from minicpm_megatron.training.run_data import RunData, label_bytes, validation_samples


def train_reader(recipe: Recipe, data: RunData) -> BatchReader:
    """This rank's training micro-batches."""
    return BatchReader(data.train, **_rank_keywords(recipe))


def held_out_sets(recipe: Recipe, data: RunData) -> dict[str, HeldOut]:
    """This rank's part of every held-out set."""
    keywords = _rank_keywords(recipe)
    return {
        name: HeldOut(
            reader=BatchReader(dataset, **keywords),
            samples=validation_samples(recipe, dataset),
            label_bytes=label_bytes(recipe, dataset),
        )
        for name, dataset in data.validation.items()
    }


def _rank_keywords(recipe: Recipe) -> dict[str, Any]:
    return {
        "documents": recipe.data.reset_attention_mask,
        "micro_batch_size": recipe.check_world_size(groups.world_size()).micro_batch_size,
        "rank": parallel_state.get_data_parallel_rank(),
        "size": parallel_state.get_data_parallel_world_size(),
        "context_rank": parallel_state.get_context_parallel_rank(),
        "context_size": parallel_state.get_context_parallel_world_size(),
    }
