"""Orders and mixtures are permutations and shares in the mathematical sense, at any place, for any layout."""

from __future__ import annotations

import itertools
from collections import Counter

import numpy as np
import pytest

from minicpm_megatron.data.sampling import Mixture, Permutation, batch, key, mix
from minicpm_megatron.errors import UserError


def test_mix_is_splitmix64() -> None:
    # first outputs of the reference generator seeded with 0 and with 1234567
    assert [mix(0), mix(0x9E3779B97F4A7C15)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert mix(1234567) == 6457827717110365317


def test_key_depends_on_every_part() -> None:
    parts = [(1,), (2,), (1, 0), (0, 1), (1, "a"), ("a", 1), (1, "b"), (1, "ab"), (1, "a", "b", 1)]
    assert len({key(*part) for part in parts}) == len(parts)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 8, 63, 64, 65, 1000, 4097])
def test_permutation_is_one_and_both_forms_agree(size: int) -> None:
    order = Permutation(size, seed=9)
    scalar = [order(place) for place in range(size)]
    assert sorted(scalar) == list(range(size))
    assert order.take(np.arange(size)).tolist() == scalar


def test_permutation_at_large_sizes() -> None:
    order = Permutation(3 * 10**12 + 1, seed=1)
    places = np.array([0, 1, 10**12, 3 * 10**12])
    assert order.take(places).tolist() == [order(int(place)) for place in places]
    assert len(set(order.take(np.arange(20_000)).tolist())) == 20_000


def test_permutations_are_uniform_over_seeds() -> None:
    """Each of the 24 orders of 4 things about equally often; chi-squared, 23 degrees, 49.7 is the 0.1 % point."""
    runs = 2400
    seen = Counter(tuple(Permutation(4, seed=key(seed))(place) for place in range(4)) for seed in range(runs))
    expected = runs / 24
    assert sum((seen[order] - expected) ** 2 / expected for order in itertools.permutations(range(4))) < 49.7


def test_permutation_leaves_no_trace_of_the_order() -> None:
    order = Permutation(10_000, seed=5).take(np.arange(10_000))
    assert abs(np.corrcoef(np.arange(10_000), order)[0, 1]) < 0.04
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.04


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.5, 0.3, 0.2], [7, 2, 1, 0.01], [1e-3, 1], [1 / 3] * 3])
def test_mixture_follows_the_weights_at_every_prefix(weights: list[float]) -> None:
    mixture, shares = Mixture(weights, seed=3), np.array(weights) / np.sum(weights)
    counts = np.zeros(len(weights), dtype=int)
    for sample in range(3 * mixture.block if mixture.block < 20_000 else 30_000):
        source, index = mixture(sample)
        assert index == counts[source]  # each source is read in order, without a gap
        counts[source] += 1
        assert np.abs(counts - shares * (sample + 1)).max() < 3


def test_mixture_does_not_drift() -> None:
    weights = [0.7, 0.2, 0.1]
    mixture = Mixture(weights, seed=0)
    far = 10**13
    counts = mixture.consumed(far // mixture.block)
    samples = far // mixture.block * mixture.block
    assert sum(counts) == samples
    assert max(abs(count - samples * share) for count, share in zip(counts, weights, strict=True)) < 2


def test_mixture_depends_on_nothing_else() -> None:
    forwards = Mixture([3, 1], seed=4)
    expected = [forwards(sample) for sample in range(5000)]
    backwards = Mixture([3, 1], seed=4)
    assert [backwards(sample) for sample in reversed(range(5000))] == expected[::-1]
    assert [Mixture([0.75, 0.25], seed=4)(sample) for sample in (0, 4999)] == [expected[0], expected[4999]]
    assert [Mixture([3, 1], seed=5)(sample) for sample in range(500)] != expected[:500]


@pytest.mark.parametrize("weights", [[], [0.0], [1, -1], [float("nan"), 1], [float("inf")], [1, 1e-9]])
def test_unusable_weights(weights: list[float]) -> None:
    with pytest.raises(UserError, match=r"data\.train"):
        Mixture(weights, seed=0)


@pytest.mark.parametrize(("ranks", "micro"), [(1, 1), (1, 12), (2, 3), (3, 2), (4, 3), (6, 2), (12, 1)])
def test_union_over_ranks_is_the_step(ranks: int, micro: int) -> None:
    for first in (0, 12, 5004):
        taken = [batch(first, 12, rank, ranks, micro) for rank in range(ranks)]
        assert all(part.shape == (12 // ranks // micro, micro) for part in taken)
        assert sorted(np.concatenate(taken, axis=None).tolist()) == list(range(first, first + 12))


@pytest.mark.parametrize(("size", "ranks", "micro"), [(10, 3, 1), (8, 2, 3), (8, 2, 0), (0, 1, 1)])
def test_indivisible_batch(size: int, ranks: int, micro: int) -> None:
    with pytest.raises(UserError, match="cannot be divided"):
        batch(0, size, 0, ranks, micro)
