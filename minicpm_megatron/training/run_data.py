"""What a run reads, opened and checked before the first step; loads neither torch nor Megatron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from minicpm_megatron.data.dataset import Blend, TokenDataset, open_training_data
from minicpm_megatron.data.metadata import data_fingerprint
from minicpm_megatron.data.tokenizer import tokenizer_sha256
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe

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
