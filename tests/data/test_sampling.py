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


def drift(mixture: Mixture, weights: list[float], samples: int) -> float:
    """The most that any source is away from its share at any prefix."""
    taken = np.array([mixture(sample) for sample in range(samples)])
    shares, number = np.array(weights) / np.sum(weights), np.arange(1, samples + 1)
    worst = 0.0
    for source, share in enumerate(shares):
        mine = taken[:, 0] == source
        counts = np.cumsum(mine)
        assert (taken[mine, 1] == np.arange(counts[-1])).all()  # in order, without a gap
        worst = max(worst, float(np.abs(counts - share * number).max()))
    return worst


@pytest.mark.parametrize("sources", [4, 30, 100, 1000])
@pytest.mark.parametrize("shape", ["one large", "zipf", "powers", "equal"])
def test_no_number_of_sources_makes_a_mixture_drift(sources: int, shape: str) -> None:
    ranks = np.arange(1, sources + 1)
    weights = {
        "one large": np.where(ranks == 1, sources - 1.0, 1.0),  # half of all, and many that come at the same time
        "zipf": 1.0 / ranks,
        "powers": 0.7 ** np.minimum(ranks, 30),
        "equal": np.ones(sources),
    }[shape].tolist()
    assert drift(Mixture(weights, seed=3), weights, 20_000) < 3


def test_the_tree_stays_within_its_bound_wherever_it_is_looked_at() -> None:
    weights = [0.9, 0.05, 0.02, 0.02, 0.01]
    mixture = Mixture(weights, seed=1)
    assert [mixture(sample) for sample in reversed(range(300))] == [mixture(sample) for sample in range(300)][::-1]
    far = 10**13
    taken = [mixture(far + step) for step in range(2000)]
    for source, index in taken[-1:]:
        assert abs(index - weights[source] * (far + 2000)) < 3
    assert [mixture(sample) for sample in range(300)] != [Mixture(weights, seed=2)(sample) for sample in range(300)]


KNOWN = {
    (1.0, 1.0, 1.0): "01110001102212221202011101122001200211222020121110",
    (0.7, 0.2, 0.1): "00100000100020020000000021000020000100010002011001",
    (3.0, 1.0): "00000000000000000000000100001000000110010000100000",
}


def test_mixtures_of_few_sources_are_what_they_were() -> None:
    """Their order decides what runs have read: a change here makes them read other samples when they are resumed."""
    orders = {
        weights: "".join(str(mixture(sample)[0]) for sample in range(0, 40_000, 800))
        for weights in [(1.0, 1.0, 1.0), (0.7, 0.2, 0.1), (3.0, 1.0)]
        for mixture in [Mixture(weights, seed=7)]
    }
    assert orders == KNOWN


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
