"""Tokenised corpora as an endless sequence of samples, read through Megatron-Core's IndexedDataset.

Sample k is a pure function of (seed, data, k). Megatron's own GPTDataset lays out documents over all epochs of the
planned run, so that a longer run, or a branch that decays earlier, sees other data from the first step on; here an
epoch is laid out by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minicpm_megatron.data.indexed_format import bin_path, open_index
from minicpm_megatron.data.megatron_dataset import open_indexed_dataset
from minicpm_megatron.data.metadata import TokenMetadata, data_fingerprint, read_metadata
from minicpm_megatron.data.sampling import Mixture, Permutation, key
from minicpm_megatron.errors import UserError

_STRIDE = 64
_BLOCK = 1 << 20


class SampleSource(Protocol):
    """Anything that has a sample for every k >= 0."""

    sequence_length: int

    def __getitem__(self, sample: int) -> np.ndarray: ...

    def starts(self, sample: int) -> np.ndarray: ...


class _Epoch:
    """The documents of one epoch in their order, with the token position of every 64th."""

    def __init__(self, order: Permutation, sizes: np.ndarray) -> None:
        self.order, self.sizes = order, sizes
        self.positions = np.zeros(-(-order.size // _STRIDE) + 1, dtype=np.int64)
        for first in range(0, order.size, _BLOCK):
            last = min(first + _BLOCK, order.size)
            taken = sizes[order.take(np.arange(first, last))].astype(np.int64)
            sums = np.add.reduceat(taken, np.arange(0, last - first, _STRIDE))
            self.positions[first // _STRIDE + 1 : first // _STRIDE + 1 + len(sums)] = sums
        np.cumsum(self.positions, out=self.positions)

    def spans(self, start: int, length: int) -> list[tuple[int, int, int]]:
        """(document, offset, tokens) that `length` tokens from position `start` of the epoch are made of."""
        group = int(np.searchsorted(self.positions, start, side="right")) - 1
        offset, found = start - int(self.positions[group]), []
        while length:
            places = np.arange(group * _STRIDE, min((group + 1) * _STRIDE, self.order.size))
            documents = self.order.take(places)
            for document, size in zip(documents.tolist(), self.sizes[documents].tolist(), strict=True):
                if offset >= size:
                    offset -= size
                    continue
                taken = min(length, size - offset)
                found.append((document, offset, taken))
                offset, length = 0, length - taken
                if not length:
                    break
            group += 1
        return found


class TokenDataset:
    """One tokenised corpus, for ever: dataset[k] is an int64 array of sequence_length + 1 tokens.

    Each epoch permutes the documents by (seed, epoch), joins them, cuts the stream into floor((tokens - 1) /
    sequence_length) samples, of which neighbours share one token, and permutes these by (seed, epoch). Each sample
    comes once an epoch; epochs follow one another without a seam.

    Memory: .bin and .idx are mapped; an epoch's layout takes 1/8 byte a document (0.13 GB for 1e9 documents) and
    about 0.3 microseconds a document to compute, once an epoch. The last two epochs are kept, so that ranks and
    micro-batches around a seam do not compute it again.

    Args:
        prefix: PREFIX.bin and PREFIX.idx.
        sequence_length: tokens that the model sees a sample.
        seed: decides the order.
        vocab_size: rows of the model's embedding, to refuse ids beyond; None skips the check.
        tokenizer_sha256: of the run's tokenizer, to refuse data of another; None skips the check.

    Raises:
        UserError: the files are damaged or do not fit the model, the tokenizer or the length.
    """

    def __init__(
        self,
        prefix: str | Path,
        sequence_length: int,
        seed: int,
        *,
        vocab_size: int | None = None,
        tokenizer_sha256: str | None = None,
    ) -> None:
        if sequence_length < 1:
            raise UserError(
                f"{sequence_length} tokens are no sample", where="data.sequence_length", fix="give 1 or more"
            )
        self.prefix, self.sequence_length, self.seed = str(prefix), sequence_length, seed
        self.vocab_size = vocab_size
        self.index = open_index(prefix)
        self.fingerprint = data_fingerprint(prefix)
        self.metadata = read_metadata(prefix)
        check_fits(prefix, self.metadata, self.index.dtype, vocab_size, tokenizer_sha256)
        if self.index.tokens <= sequence_length:
            raise UserError(
                f"{self.index.tokens} tokens are fewer than one sample of {sequence_length} + 1",
                where=str(bin_path(prefix)),
                fix="shorten data.sequence_length or add data",
            )
        self.samples_per_epoch = (self.index.tokens - 1) // sequence_length
        self._epochs: dict[int, tuple[_Epoch, Permutation]] = {}

    @cached_property
    def _reader(self) -> Any:
        return open_indexed_dataset(self.prefix)

    @cached_property
    def _sizes(self) -> np.ndarray:
        """Tokens of each document; what we write has one sequence a document, and then nothing is copied."""
        bounds, lengths = self.index.documents, self.index.lengths
        if len(bounds) == len(lengths) + 1:
            return lengths
        sums = np.concatenate(([0], np.cumsum(lengths, dtype=np.int64)))
        sizes: np.ndarray = sums[bounds[1:]] - sums[bounds[:-1]]
        return sizes

    def _epoch(self, number: int) -> tuple[_Epoch, Permutation]:
        if number not in self._epochs:
            while len(self._epochs) > 1:
                self._epochs.pop(next(iter(self._epochs)))
            documents = Permutation(len(self._sizes), key(self.seed, "documents", number))
            samples = Permutation(self.samples_per_epoch, key(self.seed, "samples", number))
            self._epochs[number] = (_Epoch(documents, self._sizes), samples)
        return self._epochs[number]

    def __getitem__(self, sample: int) -> np.ndarray:
        """Sample k >= 0 as int64 [sequence_length + 1]: inputs are [:-1], labels [1:].

        Raises:
            UserError: an id is outside of the vocabulary; the metadata can be sound and the ids not.
        """
        parts = [self._read(*span) for span in self._spans(sample, self.sequence_length + 1)]
        return np.concatenate(parts).astype(np.int64)

    def starts(self, sample: int) -> np.ndarray:
        """Of each input token of sample k its document's first position in the sample: int64 [sequence_length]."""
        lengths = [length for _, _, length in self._spans(sample, self.sequence_length)]
        return np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)

    def document_places(self, sample: int, offset: int) -> np.ndarray:
        """Where sample k holds token number `offset` (from 0) of a document: int64 in [0, sequence_length]."""
        places, start = [], 0
        for _, first, length in self._spans(sample, self.sequence_length + 1):
            if first <= offset < first + length:
                places.append(start + offset - first)
            start += length
        return np.array(places, dtype=np.int64)

    def _spans(self, sample: int, length: int) -> list[tuple[int, int, int]]:
        """(document, offset, tokens) of the first `length` tokens of sample k."""
        if sample < 0:
            raise IndexError(sample)
        number, place = divmod(int(sample), self.samples_per_epoch)
        epoch, order = self._epoch(number)
        return epoch.spans(order(place) * self.sequence_length, length)

    def _read(self, document: int, offset: int, length: int) -> np.ndarray:
        # the sequences of a document lie one after another, so reading on from its first is reading the document
        ids: np.ndarray = self._reader.get(int(self.index.documents[document]), offset=offset, length=length)
        if self.vocab_size is not None and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            wrong = ids[(ids < 0) | (ids >= self.vocab_size)][0]
            raise UserError(
                f"document {document} holds id {wrong}, outside of the vocabulary of {self.vocab_size}",
                where=str(bin_path(self.prefix)),
                fix="make it again with minicpm preprocess",
            )
        return ids


class Blend:
    """Several corpora mixed by weight: blend[k] is a sample of the corpus that `Mixture` names for k.

    Where a new stage of a run begins is the caller's business: a blend of other weights or corpora is another object
    and changes nothing about the samples before it.

    Args:
        datasets: the corpora, of one sequence length.
        weights: share of each in the samples.
        seed: decides the order of the corpora.

    Raises:
        UserError: a weight is not positive and finite, or numbers or lengths differ.
    """

    def __init__(self, datasets: Sequence[SampleSource], weights: Sequence[float], seed: int) -> None:
        if len(datasets) != len(weights):
            raise UserError(
                f"{len(weights)} weights for {len(datasets)} corpora", where="data.train", fix="give one each"
            )
        self.mixture = Mixture(weights, seed)
        self.datasets = tuple(datasets)
        lengths = sorted({dataset.sequence_length for dataset in datasets})
        if len(lengths) > 1:
            raise UserError(
                f"the corpora are cut to different lengths: {lengths}", where="data.sequence_length", fix="use one"
            )
        self.sequence_length = lengths[0]

    def source(self, sample: int) -> tuple[int, int]:
        """(corpus, sample of that corpus) of sample k."""
        return self.mixture(sample)

    def __getitem__(self, sample: int) -> np.ndarray:
        """Sample k >= 0 as int64 [sequence_length + 1]."""
        corpus, index = self.mixture(sample)
        return self.datasets[corpus][index]

    def starts(self, sample: int) -> np.ndarray:
        """As `TokenDataset.starts`, of sample k >= 0."""
        corpus, index = self.mixture(sample)
        return self.datasets[corpus].starts(index)


def check_fits(
    prefix: str | Path,
    metadata: TokenMetadata | None,
    dtype: np.dtype,
    vocab_size: int | None,
    tokenizer_sha256: str | None,
) -> None:
    """Refuse tokens that are not of this tokenizer or not within this vocabulary.

    Without PREFIX.json the ids themselves are read through once.

    Raises:
        UserError: they do not fit.
    """
    if metadata is not None and tokenizer_sha256 is not None and metadata.tokenizer_sha256 != tokenizer_sha256:
        raise UserError(
            f"made with another tokenizer ({metadata.tokenizer_sha256[:12]}) than the run's ({tokenizer_sha256[:12]})",
            where=str(bin_path(prefix)),
            fix="set data.tokenizer to that one or tokenise again",
        )
    if vocab_size is None:
        return
    if metadata is not None and metadata.vocab_size > vocab_size:
        raise UserError(
            f"made for a vocabulary of {metadata.vocab_size}, but model.vocab_size is {vocab_size}",
            where=str(bin_path(prefix)),
            fix=f"set model.vocab_size={metadata.vocab_size}",
        )
    largest = metadata.max_id if metadata is not None else _largest_id(bin_path(prefix), dtype)
    if largest >= vocab_size:
        raise UserError(
            f"holds id {largest}, beyond model.vocab_size {vocab_size}",
            where=str(bin_path(prefix)),
            fix="use the tokenizer's vocabulary size",
        )


def _largest_id(path: Path, dtype: np.dtype) -> int:
    if not path.stat().st_size:
        return -1
    ids = np.memmap(path, dtype=dtype, mode="r")
    return max(int(ids[first : first + _BLOCK].max()) for first in range(0, len(ids), _BLOCK))


def open_training_data(
    sources: Sequence[tuple[str, float]],
    sequence_length: int,
    seed: int,
    *,
    vocab_size: int | None = None,
    tokenizer_sha256: str | None = None,
) -> Blend:
    """The training samples of a run: (prefix, weight) of each corpus, checked, as one blend.

    The order inside a corpus depends on the seed and on its place in the list, so that one corpus named twice is
    not read in step with itself.

    Raises:
        UserError: anything that `TokenDataset` or `Blend` refuses.
    """
    Mixture([weight for _, weight in sources], seed)  # a wrong weight is told before gigabytes are mapped
    datasets = [
        TokenDataset(
            prefix,
            sequence_length,
            key(seed, "corpus", number),
            vocab_size=vocab_size,
            tokenizer_sha256=tokenizer_sha256,
        )
        for number, (prefix, _) in enumerate(sources)
    ]
    return Blend(datasets, [weight for _, weight in sources], seed)
