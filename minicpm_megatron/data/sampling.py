"""Which sample comes when: pure arithmetic on (seed, sizes, k), the same on every rank and for every run length.

Nothing is drawn in advance. A permutation is computed place by place from a key, a mixture from exact fractions, so
sample k can be asked for at any k at once, does not depend on how many samples follow or how many ranks read, and
does not change with a library's random generators.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np

from minicpm_megatron.data.mixture_tree import MixtureTree
from minicpm_megatron.errors import UserError

JITTER, TREE = "jitter", "tree"

_ROUNDS = 8
_MASK = (1 << 64) - 1


def mix(value: int) -> int:
    """64 well-mixed bits of a 64-bit number (the finaliser of SplitMix64)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def key(*parts: int | str) -> int:
    """One 64-bit key of several parts; any change in any part gives an unrelated one."""
    state = 0
    for part in parts:
        values = [part] if isinstance(part, int) else [*part.encode()]
        for value in values:
            state = mix(state ^ mix(value & _MASK))
    return state


class Permutation:
    """A pseudo-random order of range(size) that needs no memory.

    A balanced Feistel network over the smallest number of bits that holds `size`, walked again while the result is
    out of range (fewer than four walks on average).

    Args:
        size: number of places, below 2^62.
        seed: a 64-bit key.
    """

    def __init__(self, size: int, seed: int) -> None:
        if not 0 <= size < 1 << 62:
            raise ValueError(f"size {size} is out of range")
        self.size = size
        self.half = max(1, -(-max(1, size - 1).bit_length() // 2))
        self.keys = [key(seed, number) for number in range(_ROUNDS)]

    def __call__(self, place: int) -> int:
        """What stands at `place`."""
        if not 0 <= place < self.size:
            raise IndexError(place)
        mask, value = (1 << self.half) - 1, place
        while True:
            left, right = value >> self.half, value & mask
            for round_key in self.keys:
                left, right = right, left ^ (mix(right ^ round_key) & mask)
            value = left << self.half | right
            if value < self.size:
                return value

    def take(self, places: np.ndarray) -> np.ndarray:
        """What stands at each of `places` (int64), by the same arithmetic on arrays."""
        half, mask = np.uint64(self.half), np.uint64((1 << self.half) - 1)
        values = places.astype(np.uint64)
        pending = np.arange(len(values))
        while len(pending):
            left, right = values[pending] >> half, values[pending] & mask
            for round_key in self.keys:
                left, right = right, left ^ (_mix_array(right ^ np.uint64(round_key)) & mask)
            values[pending] = left << half | right
            pending = pending[values[pending] >= self.size]
        return values.astype(np.int64)


def _mix_array(values: np.ndarray) -> np.ndarray:
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: np.ndarray = values ^ (values >> np.uint64(31))
    return mixed


class Mixture:
    """Which source sample k is of, and which sample of that source it is.

    At every prefix each source is within 3 samples of its share.

    Time is cut into blocks. How many samples of a source the first b blocks hold is its exact share rounded, so the
    realised shares never drift; inside a block the samples of a source are spread evenly with a jitter from the
    seed. Such a source is less than 1 + (1 - p) + p (n - 1) samples away from its share p among n sources: 1 by
    rounding the blocks, and in the block less than 1 by its own jitter, times 1 - p, and less than 1 by that of each
    other, times p. Where that is more than 3, `MixtureTree` mixes instead.

    Args:
        weights: share of each source, in any unit.
        seed: decides the jitter.

    Raises:
        UserError: there is no weight, or one is not positive and finite.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        if not weights:
            raise UserError("there is no corpus to mix", where="data.train", fix="name at least one")
        for number, weight in enumerate(weights):
            if not (math.isfinite(weight) and weight > 0):
                raise UserError(
                    f"weight {weight!r} is not positive and finite",
                    where=f"data.train[{number}].weight",
                    fix="give a positive number or remove the source",
                )
        exact = [Fraction(weight) for weight in weights]
        total = sum(exact)
        self.seed = seed
        # share of all sources before each one; the last is exactly 1
        self.bounds = [sum(exact[:number], Fraction(0)) / total for number in range(len(exact) + 1)]
        rarest = min(exact) / total
        # a block holds at least two samples of the rarest source, or rounding could take one back
        self.block = min(1 << 20, max(1 << 10, 1 << math.ceil(math.log2(4 / float(rarest)))))
        if rarest * self.block < 2:
            raise UserError(
                f"a share of {float(rarest):.1e} is too small to be followed",
                where="data.train",
                fix="give weights that differ less",
            )
        self._shares = exact
        self._order = lru_cache(maxsize=4)(self._block_order)
        # 1 + (1 - p) + p (n - 1) <= 3
        self.follow(JITTER if max(exact) * (len(exact) - 2) <= total else TREE)

    def follow(self, method: str) -> None:
        """Mix by `method`, JITTER or TREE, whatever the shares: what a run has begun with decides what it has read.

        Raises:
            UserError: there is no such method.
        """
        if method not in (JITTER, TREE):
            raise UserError(f"corpora were mixed by {method!r}, which this version does not know", where="data.train")
        self.method = method
        self._tree = None if method == JITTER else MixtureTree(self._shares, partial(key, self.seed, "mixture tree"))

    def consumed(self, blocks: int) -> list[int]:
        """Samples of each source in the first `blocks` blocks, where these decide the order."""
        edges = [math.floor(bound * blocks * self.block) for bound in self.bounds]
        return [after - before for before, after in zip(edges, edges[1:], strict=False)]

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, index within the source) of sample k >= 0."""
        if self._tree is not None:
            return self._tree(sample)
        block, place = divmod(sample, self.block)
        sources, ranks, before = self._order(block)
        source = int(sources[place])
        return source, before[source] + int(ranks[place])

    def _block_order(self, block: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        before, after = self.consumed(block), self.consumed(block + 1)
        counts = [last - first for first, last in zip(before, after, strict=True)]
        times = []
        for source, count in enumerate(counts):
            numbers = np.arange(count, dtype=np.uint64) + np.uint64(key(self.seed, "mixture", block, source))
            jitter = (_mix_array(numbers) >> np.uint64(11)).astype(np.float64) / (1 << 53)
            times.append((np.arange(count) + jitter) / count)
        sources = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        ranks = np.concatenate([np.arange(count, dtype=np.int32) for count in counts])
        order = np.argsort(np.concatenate(times), kind="stable")
        return sources[order], ranks[order], before


def batch(first_sample: int, global_batch_size: int, dp_rank: int, dp_size: int, micro_batch_size: int) -> np.ndarray:
    """The samples that one data-parallel rank takes of a step.

    Args:
        first_sample: samples consumed before the step.
        global_batch_size: samples of the step over all ranks.
        dp_rank, dp_size: place in the data-parallel group.
        micro_batch_size: samples of one forward pass.

    Returns:
        int64 [accumulation steps, micro_batch_size]. The union over ranks is first_sample .. first_sample +
        global_batch_size - 1 for every dp_size and micro_batch_size.

    Raises:
        UserError: the global batch is not a multiple of micro_batch_size x dp_size.
    """
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"rank {dp_rank} of {dp_size}")
    if micro_batch_size < 1 or global_batch_size < 1 or global_batch_size % (micro_batch_size * dp_size):
        raise UserError(
            f"{global_batch_size} samples cannot be divided into micro-batches of {micro_batch_size} on"
            f" {dp_size} ranks",
            where="training.global_batch_size",
            fix="make it a multiple of micro_batch_size x data-parallel size",
        )
    own = global_batch_size // dp_size
    start = first_sample + dp_rank * own
    return np.arange(start, start + own, dtype=np.int64).reshape(-1, micro_batch_size)
