"""Samples of the data room as tensors on this rank's device, by position in the run."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np
import torch

from minicpm_megatron.data.dataset import SampleSource
from minicpm_megatron.data.sampling import batch
from minicpm_megatron.parallel import device
from minicpm_megatron.parallel.zigzag import zigzag


class BatchReader:
    """The micro-batches of one data-parallel rank.

    Args:
        samples: the training order, or a held-out set.
        micro_batch_size: samples a forward pass.
        rank, size: of the data-parallel group.
        context_rank, context_size: of the context-parallel group, which shares each sequence in Megatron-Core's
            zigzag order.
        documents: tell where the documents of a sample begin, so that attention ends at their borders.

    Attributes:
        fields, sequences: what samples carry beside tokens and labels, and how many rows make one, for an objective.
    """

    fields: Collection[str] = ()
    sequences = 1

    def __init__(
        self,
        samples: SampleSource,
        *,
        micro_batch_size: int,
        rank: int,
        size: int,
        context_rank: int = 0,
        context_size: int = 1,
        documents: bool = False,
    ) -> None:
        self.samples, self.micro_batch_size = samples, micro_batch_size
        self.rank, self.size = rank, size
        self.context_rank, self.context_size = context_rank, context_size
        self.documents = documents

    def micro_batches(
        self, first_sample: int, global_batch_size: int, row_length: int | None = None
    ) -> Iterator[tuple[torch.Tensor, ...]]:
        """This rank's part of the global batch [first_sample, first_sample + global_batch_size).

        Args:
            row_length: feed each sample as several rows of so many tokens; None: as one.

        Yields:
            (tokens, labels), int64 [micro_batch_size, sequence_length / context_size] each, or as many more rows as
            they are shorter; labels one token ahead. With `documents` also starts, of the same shape: where in the
            row each token's document begins.
        """
        mine = batch(first_sample, global_batch_size, self.rank, self.size, self.micro_batch_size)
        for indices in mine:
            yield self._tensors(indices.tolist(), row_length)

    def first_samples(self, count: int) -> Iterator[tuple[list[int], tuple[torch.Tensor, ...]]]:
        """Samples 0 to count - 1, each on one data-parallel rank, in equally many micro-batches on every rank.

        Where `count` is no multiple of micro_batch_size x data-parallel size, the last micro-batches are filled with
        repetitions of the last sample: ranks that had fewer would leave the others waiting in their collectives.

        Yields:
            The samples that count, which are the first rows of the micro-batch, and (tokens, labels) as of
            `micro_batches`.
        """
        together = self.micro_batch_size * self.size
        for first in range(self.rank * self.micro_batch_size, -(-count // together) * together, together):
            indices = range(first, first + self.micro_batch_size)
            counted = [index for index in indices if index < count]
            yield counted, self._tensors([min(index, count - 1) for index in indices], None)

    def _tensors(self, indices: list[int], row_length: int | None) -> tuple[torch.Tensor, ...]:
        both = device.from_host(torch.from_numpy(np.stack([self.samples[index] for index in indices])))
        wholes = [both[:, :-1], both[:, 1:]]
        if self.documents:
            starts = np.stack([self.samples.starts(index) for index in indices])
            wholes.append(device.from_host(torch.from_numpy(starts)))
        if row_length is not None:
            wholes = [whole.reshape(-1, row_length) for whole in wholes]
        if row_length is not None and self.documents:
            rows = torch.arange(wholes[2].size(0), device=wholes[2].device)
            first = rows * row_length % self.samples.sequence_length
            # of a document that began before it, a row sees what is in it
            wholes[2] = (wholes[2] - first[:, None]).clamp(min=0)
        return tuple(self._part(whole) for whole in wholes)

    def _part(self, whole: torch.Tensor) -> torch.Tensor:
        if self.context_size > 1:
            whole = zigzag(whole, self.context_size, self.context_rank, dim=1)
        return whole.contiguous()
