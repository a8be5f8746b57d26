"""Which of many sources sample k is of: a binary tree whose nodes share their samples out in two, evenly.

Huffman's tree over the shares: the two smallest parts are joined until one is left. A node that has had k samples has
given its left part floor(k q + u) of them, where q is that part's share in the node and the phase u, between 1/4 and
3/4, comes from the seed. So at every node a part is at most 3/4 of a sample away from its share.

A source of share w below nodes of shares W_1 < W_2 < ... < W_d = 1 is then away from its share by at most
3/4 (1 + w/W_1 + ... + w/W_(d-1)). Huffman's choice makes the sibling of each node no smaller than either of the node's
own parts, so that W_(i+1) >= W_i + W_(i-1) with W_0 = w: the W_i / w grow at least as 1, 2, 3, 5, 8, ..., and the sum
stays below that of the reciprocal Fibonacci numbers, 3.36. That is less than 2.52 samples for any number of sources.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction

_BITS = 32  # of a phase


@dataclass(frozen=True)
class _Node:
    """Two parts: floor((k left + shift) / whole) of k samples are the left one's, all integers."""

    left: int
    whole: int
    shift: int
    parts: tuple[_Node | int, _Node | int]

    def given(self, samples: int) -> int:
        return (samples * self.left + self.shift) // self.whole


class MixtureTree:
    """Which source sample k is of, and which sample of that source it is.

    At every prefix each source is within 3 samples of its share (see the module). A sample costs as many divisions as
    the tree is deep there, at most 1.44 log2(1 / share) + 1.

    Args:
        shares: of two sources or more, positive, of any sum.
        phases: number of a node -> 64 random bits.
    """

    def __init__(self, shares: Sequence[Fraction], phases: Callable[[int], int]) -> None:
        number = itertools.count()
        parts: list[tuple[Fraction, int, _Node | int]] = [
            (share, next(number), source) for source, share in enumerate(shares)
        ]
        heapq.heapify(parts)
        while len(parts) > 1:
            small, _, left = heapq.heappop(parts)
            large, _, right = heapq.heappop(parts)
            whole = small + large
            q, phase = small / whole, phases(next(number)) >> (64 - _BITS)
            # q k + u as integers over one denominator, u = 1/4 + phase / 2^33
            shift = q.denominator * ((1 << (_BITS - 1)) + phase)
            node = _Node(q.numerator << (_BITS + 1), q.denominator << (_BITS + 1), shift, (left, right))
            heapq.heappush(parts, (whole, next(number), node))
        self._root = parts[0][2]

    def __call__(self, sample: int) -> tuple[int, int]:
        """(source, index within the source) of sample k >= 0."""
        node = self._root
        while isinstance(node, _Node):
            before = node.given(sample)
            if node.given(sample + 1) > before:
                node, sample = node.parts[0], before
            else:
                node, sample = node.parts[1], sample - before
        return node, sample
