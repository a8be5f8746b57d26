"""Costs against sums written down one by one."""

from __future__ import annotations

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.economics import break_even_tokens, serving_flops, training_flops, trunk_tokens
from minicpm_megatron.methods.scaling_law import PUBLISHED, PUBLISHED_COMPUTE


def test_both_ways_cost_the_same_at_the_break_even() -> None:
    """The compute-optimal model of the average law against one of half its size trained to the same loss."""
    law = PUBLISHED["average"].law
    n, d = law.n_opt(PUBLISHED_COMPUTE), law.d_opt(PUBLISHED_COMPUTE)
    large, small = (n * 1e9, d * 1e9), (n / 2 * 1e9, law.tokens_for(n / 2, float(law.loss(n, d))) * 1e9)
    served = break_even_tokens(large, small)
    totals = [training_flops(*model) + serving_flops(model[0], served) for model in (large, small)]
    assert totals[0] == pytest.approx(totals[1], rel=1e-12)
    assert training_flops(*small) > training_flops(*large) and served > 0
    # nothing near the optimum is cheaper to train
    assert training_flops(*large) == pytest.approx(PUBLISHED_COMPUTE, rel=1e-12)


def test_a_small_model_that_is_no_dearer_pays_at_once() -> None:
    assert break_even_tokens((10.0, 10.0), (5.0, 20.0)) == 0.0 == break_even_tokens((10.0, 10.0), (5.0, 10.0))


@pytest.mark.parametrize("pair", [((5.0, 1.0), (5.0, 1.0)), ((5.0, 1.0), (6.0, 1.0)), ((5.0, 0.0), (4.0, 1.0))])
def test_refused_pairs(pair: tuple[tuple[float, float], tuple[float, float]]) -> None:
    with pytest.raises(UserError, match="give the larger model first"):
        break_even_tokens(*pair)


@pytest.mark.parametrize("share", [0.05, 0.1, 1.0])
def test_shared_trunk_counted_token_by_token(share: float) -> None:
    ends = [100, 200, 400]
    trunk: set[int] = set()
    decays = 0
    for end in ends:
        leaves = round(end * (1 - share))
        trunk |= set(range(leaves))
        decays += end - leaves
    assert trunk_tokens(ends, share) == (pytest.approx(len(trunk) + decays), 700)


def test_a_single_end_shares_nothing() -> None:
    assert trunk_tokens([40.0]) == (pytest.approx(40.0), 40.0)


@pytest.mark.parametrize(
    ("ends", "share", "line"), [([], 0.1, "ends"), ([1, 0], 0.1, "ends"), ([1], 0.0, "decay_share"), ([1], 2, "decay")]
)
def test_refused_trunks(ends: list[float], share: float, line: str) -> None:
    with pytest.raises(UserError, match=line):
        trunk_tokens(ends, share)
