"""Mean token loss: the cross-entropy of every token counts alike, as in pretraining."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from minicpm_megatron.recipe import Recipe
from minicpm_megatron.training.objective import Objective

if TYPE_CHECKING:
    from torch import Tensor


class MeanTokenLoss(Objective):
    """The mean over all tokens."""

    def __init__(self, recipe: Recipe) -> None:
        """The recipe changes nothing."""

    def __call__(self, token_losses: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """The mean, a scalar."""
        return token_losses.mean()


OBJECTIVE = MeanTokenLoss
