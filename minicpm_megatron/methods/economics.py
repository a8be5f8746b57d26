"""What training and serving cost, in closed form: 6 N D to train, 2 N a token to serve.

The estimates of section 4.5 of arXiv 2404.06395 and of Kaplan et al. 2020 (arXiv 2001.08361), without attention; the
FLOPs of a real model are `training.flops`'s. Here N and D are plain counts, not in 1e9.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from minicpm_megatron.errors import UserError

DECAY_SHARE = 0.1
"""Of the tokens, that is decay: what section 4.3 finds enough."""


def training_flops(parameters: float, tokens: float) -> float:
    """C = 6 N D."""
    return 6.0 * parameters * tokens


def serving_flops(parameters: float, tokens: float) -> float:
    """2 N a token read or written."""
    return 2.0 * parameters * tokens


def break_even_tokens(large: tuple[float, float], small: tuple[float, float]) -> float:
    """Tokens that must be served before a smaller model, trained longer to the same loss, has been the cheaper one.

    (6 N_s D_s - 6 N_l D_l) / (2 N_l - 2 N_s): the training that it takes more, over what it saves a token. Section 4.3
    (after Sardana & Frankle 2023, arXiv 2401.00448) has 0.036B for 0.17B: about 4 times the training, a fifth of the
    cost of a token.

    Args:
        large, small: (parameters, tokens trained on) of two models of equal loss.

    Returns:
        Served tokens; 0 where the small model was no dearer to train.

    Raises:
        UserError: values that are not positive, or a small model that is not smaller.

    >>> break_even_tokens((10e9, 200e9), (5e9, 500e9))
    300000000000.0
    """
    (n_large, d_large), (n_small, d_small) = large, small
    if not min(n_large, d_large, n_small, d_small) > 0 or not n_small < n_large:
        raise UserError(
            f"{n_small:g} parameters for {n_large:g}, on {d_small:g} and {d_large:g} tokens",
            where="break_even_tokens",
            fix="give the larger model first",
        )
    dearer = training_flops(n_small, d_small) - training_flops(n_large, d_large)
    return max(0.0, dearer / (serving_flops(n_large, 1) - serving_flops(n_small, 1)))


def trunk_tokens(ends: Sequence[float], decay_share: float = DECAY_SHARE) -> tuple[float, float]:
    """Tokens that decayed checkpoints at several lengths cost: with one stable trunk, and each from the start.

    A model that ends decayed after D tokens leaves the trunk decay_share D before (section 4.2). The trunk runs as far
    as the last branch needs, every branch pays its own decay: what makes a scaling law cost O(m) runs, not O(m^2).

    Args:
        ends: D of each checkpoint, in any unit.
        decay_share: of D that is decay, in (0, 1].

    Returns:
        (shared, separate), in the unit of `ends`.

    Raises:
        UserError: no ends, ends that are not positive, or a share out of range.

    >>> shared, separate = trunk_tokens([10, 20, 30, 40, 50, 60])
    >>> round(shared, 6), separate
    (75.0, 210.0)
    """
    if not ends or not min(ends) > 0:
        raise UserError(f"{list(ends)} are no lengths", where="ends", fix="give at least one, all above 0")
    if not 0 < decay_share <= 1:
        raise UserError(f"{decay_share} is no share", where="decay_share", fix="give 0.1 for a tenth")
    return (1 - decay_share) * max(ends) + math.fsum(decay_share * end for end in ends), math.fsum(ends)
