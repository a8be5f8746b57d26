"""What a run reads, opened and checked before the first step; loads neither torch nor Megatron."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from minicpm_megatron.data.dataset import Blend, TokenDataset, open_training_data
from minicpm_megatron.data.metadata import data_fingerprint
from minicpm_megatron.data.sampling import JITTER
from minicpm_megatron.data.statistics import bytes_per_token
from minicpm_megatron.data.text_bytes import TextBytes
from minicpm_megatron.data.tokenizers import load_tokenizer, tokenizer_sha256
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe

VALIDATION_SEED = 0
MIXTURE = "mixture"
"""Key of a manifest: how the corpora are mixed, see `data.sampling.Mixture.method`."""


@dataclass(frozen=True)
class RunData:
    """Everything a run reads.

    Attributes:
        train: training samples in order.
        validation: held-out sets by name, by prefix.
        fingerprint: prefix -> what identifies its content; kept in checkpoints.
        tokenizer_sha256: what identifies data.tokenizer, None where the recipe names none; kept in checkpoints, too.
    """

    train: Blend
    validation: dict[str, TokenDataset]
    fingerprint: dict[str, str]
    tokenizer_sha256: str | None


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
        tokenizer_sha256=check["tokenizer_sha256"],
    )


def validation_samples(recipe: Recipe, dataset: TokenDataset) -> int:
    """Samples of a validation set that an evaluation reads: evaluation.batches global batches, or all there are."""
    if recipe.evaluation.batches is None:
        return dataset.samples_per_epoch
    return min(recipe.evaluation.batches * recipe.training.global_batch_size, dataset.samples_per_epoch)


def label_bytes(recipe: Recipe, dataset: TokenDataset) -> Callable[[int], float] | None:
    """sample -> UTF-8 bytes of text that its labels stand for; None where they are not known.

    They are counted with data.tokenizer. Without it only those of the whole set are known, from PREFIX.json: then each
    sample of a set that is read to its end is given the same number. Tokens of another program have no PREFIX.json.
    """
    metadata = dataset.metadata
    if metadata is None:
        return None
    if recipe.data.tokenizer is not None:
        count = TextBytes(load_tokenizer(recipe.data.tokenizer)).of_labels
        return functools.cache(lambda sample: count(dataset, metadata, sample))
    if validation_samples(recipe, dataset) < dataset.samples_per_epoch:
        return None
    mean = bytes_per_token(dataset.prefix) * dataset.sequence_length
    return lambda sample: mean


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


def keep_order(manifest: dict[str, Any], recipe: Recipe, data: RunData) -> None:
    """Mix the corpora of `data` as the run of a checkpoint has mixed them, where the recipe mixes the same ones.

    Versions before manifests had `MIXTURE` knew jitter alone.

    Raises:
        UserError: the manifest names a method that this version does not know.
    """
    before = [source["weight"] for source in manifest.get("recipe", {}).get("data", {}).get("train", ())]
    if before == [source.weight for source in recipe.data.train]:
        data.train.mixture.follow(manifest.get(MIXTURE, JITTER))
