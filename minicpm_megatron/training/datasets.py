"""The recipe's data section opened and checked before the first step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state

from minicpm_megatron.data.dataset import Blend, TokenDataset, open_training_data
from minicpm_megatron.data.metadata import data_fingerprint
from minicpm_megatron.data.statistics import bytes_per_token
from minicpm_megatron.data.tokenizer import tokenizer_sha256
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.batches import BatchReader
from minicpm_megatron.training.evaluate import HeldOut

VALIDATION_SEED = 0


@dataclass(frozen=True)
class RunData:
    """Everything a run reads.

    Attributes:
        train: training samples in order.
        validation: held-out sets by name, by prefix.
        fingerprint: prefix -> what identifies its content; kept in checkpoints.
    """

    train: Blend
    validation: dict[str, TokenDataset]
    fingerprint: dict[str, str]


def open_data(recipe: Recipe) -> RunData:
    """Open and check every corpus of the recipe.

    Raises:
        UserError: a file is missing or damaged, or does not fit the model, the tokenizer or the sample length.
    """
    data = recipe.data
    check: dict[str, Any] = {
        "vocab_size": recipe.model.vocab_size,
        "tokenizer_sha256": None if data.tokenizer is None else tokenizer_sha256(data.tokenizer),
    }
    sources = [(source.prefix, source.weight) for source in data.train]
    return RunData(
        train=open_training_data(sources, data.sequence_length, recipe.training.seed, **check),
        validation={
            # one seed for every run, so that the same samples are held against all of them
            name: TokenDataset(prefix, data.sequence_length, VALIDATION_SEED, **check)
            for name, prefix in data.validation.items()
        },
        fingerprint={prefix: data_fingerprint(prefix) for prefix, _ in sources},
    )


def check_unchanged(saved: dict[str, str], now: dict[str, str]) -> None:
    """Refuse to resume on training data that is not what the checkpoint was made with.

    Raises:
        UserError: naming the corpus that changed.
    """
    for prefix, fingerprint in saved.items():
        if prefix in now and now[prefix] != fingerprint:
            raise UserError(
                "the data changed since the checkpoint was saved",
                where=prefix,
                fix="restore the files, or start a run of another name",
            )


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
        smallest = recipe.training.micro_batch_size * keywords["size"]
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
        "micro_batch_size": recipe.training.micro_batch_size,
        "rank": parallel_state.get_data_parallel_rank(),
        "size": parallel_state.get_data_parallel_world_size(),
        "context_rank": parallel_state.get_context_parallel_rank(),
        "context_size": parallel_state.get_context_parallel_world_size(),
    }
