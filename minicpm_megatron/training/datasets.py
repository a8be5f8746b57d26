"""The samples of a run as this rank reads them: training and held-out sets."""

from __future__ import annotations

from typing import Any

from megatron.core import parallel_state

from minicpm_megatron.data.statistics import bytes_per_token
from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel import groups
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.batches import BatchReader
from minicpm_megatron.training.evaluate import HeldOut
from minicpm_megatron.training.run_data import RunData


def train_reader(recipe: Recipe, data: RunData) -> BatchReader:
    """This rank's training micro-batches."""
    return BatchReader(data.train, **_rank_keywords(recipe))


def held_out_sets(recipe: Recipe, data: RunData) -> dict[str, HeldOut]:
    """This rank's part of every held-out set.

    A set smaller than evaluation.batches global batches is read once, in global batches as small as one micro-batch a
    rank.
    """
    keywords = _rank_keywords(recipe)
    sets = {}
    for name, dataset in data.validation.items():
        smallest = keywords["micro_batch_size"] * keywords["size"]
        size = min(recipe.training.global_batch_size, dataset.samples_per_epoch // smallest * smallest)
        if size == 0:
            raise UserError(
                f"{dataset.samples_per_epoch} samples are fewer than the {smallest} of one micro-batch on every rank",
                where=f"data.validation.{name}",
                fix="give a larger set, or a smaller training.micro_batch_size",
            )
        sets[name] = HeldOut(
            reader=BatchReader(dataset, **keywords),
            batches=min(recipe.evaluation.batches, dataset.samples_per_epoch // size),
            global_batch_size=size,
            bytes_per_token=bytes_per_token(dataset.prefix),
        )
    return sets


def _rank_keywords(recipe: Recipe) -> dict[str, Any]:
    return {
        "documents": recipe.data.reset_attention_mask,
        "micro_batch_size": recipe.check_world_size(groups.world_size()).micro_batch_size,
        "rank": parallel_state.get_data_parallel_rank(),
        "size": parallel_state.get_data_parallel_world_size(),
        "context_rank": parallel_state.get_context_parallel_rank(),
        "context_size": parallel_state.get_context_parallel_world_size(),
    }
