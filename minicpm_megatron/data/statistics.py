"""Figures of a tokenised corpus that a loss is compared with or converted by."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from minicpm_megatron.data.indexed_format import bin_path, open_index
from minicpm_megatron.data.metadata import json_path, read_metadata
from minicpm_megatron.errors import UserError

_BLOCK = 1 << 22


def token_counts(prefix: str | Path) -> np.ndarray:
    """How often each id occurs: int64 [largest id + 1].

    Raises:
        UserError: the files are damaged, or hold a negative id.
    """
    index = open_index(prefix)
    counts = np.zeros(0, dtype=np.int64)
    if not index.tokens:
        return counts
    ids = np.memmap(bin_path(prefix), dtype=index.dtype, mode="r")
    for first in range(0, len(ids), _BLOCK):
        block = ids[first : first + _BLOCK]
        if block.min() < 0:
            raise UserError(f"holds the negative id {block.min()}", where=str(bin_path(prefix)), fix="tokenise again")
        found = np.bincount(block)
        if len(found) > len(counts):
            counts = np.pad(counts, (0, len(found) - len(counts)))
        counts[: len(found)] += found
    return counts


def unigram_entropy(prefix: str | Path) -> float:
    """Entropy of the ids' frequencies in nats a token: the loss of the best model that ignores all context.

    Raises:
        UserError: the corpus is empty or damaged.
    """
    return blend_entropy([(prefix, 1.0)])


def blend_entropy(sources: Sequence[tuple[str | Path, float]]) -> float:
    """`unigram_entropy` of the stream in which (prefix, weight) are mixed by their weights.

    It is above the mean of the corpora's own entropies: without context nobody knows which corpus a token is of.

    Raises:
        UserError: a corpus is empty or damaged.
    """
    mixed = np.zeros(0)
    for prefix, weight in sources:
        counts = token_counts(prefix)
        if not counts.sum():
            raise UserError("holds no tokens", where=str(bin_path(prefix)), fix="tokenise some text")
        size = max(len(mixed), len(counts))
        mixed = np.pad(mixed, (0, size - len(mixed)))
        mixed[: len(counts)] += weight * counts / counts.sum()
    shares = mixed[mixed > 0] / mixed.sum()
    return float(-(shares * np.log(shares)).sum())


def bytes_per_token(prefix: str | Path) -> float:
    """UTF-8 bytes of text a token of the whole corpus, <s> and </s> counted as tokens; `TextBytes` counts a part's.

    Raises:
        UserError: PREFIX.json, which holds the bytes, is missing.
    """
    metadata = read_metadata(prefix)
    if metadata is None:
        raise UserError(
            "the bytes of text are not known",
            where=str(json_path(prefix)),
            fix="make the tokens with preprocess_data.py",
        )
    return metadata.text_bytes / metadata.tokens
