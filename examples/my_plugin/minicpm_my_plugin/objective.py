"""An objective is made of the recipe, and makes a number of the losses of all tokens."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.objective import Objective

GAMMA = 1.0


class Focal(Objective):
    """Focal loss (Lin et al., arXiv 1708.02002): tokens that are predicted well already count less.

    The mean over all tokens of (1 - p)^gamma x loss, where p = exp(-loss) is the probability of the token.
    """

    def __init__(self, recipe: Recipe) -> None:
        """The recipe changes nothing."""

    def __call__(self, token_losses: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """The mean over a micro-batch, in nats."""
        return ((1 - (-token_losses).exp()) ** GAMMA * token_losses).mean()
