"""Objective: what a step minimises, as a function of the cross-entropy of every token and of what samples carry.

A member of the registry `OBJECTIVES` is a callable that takes the recipe and returns an `Objective`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor


class Objective:
    """The base of all objectives.

    The model has made the losses, so an objective works with whole logits and with the fused loss, and under every
    layout. The engine takes the mean of its values over the step's micro-batches and over all ranks that read
    different tokens. A mean over tokens that do not count alike is that of `token_losses * weight`, where the reader
    gives weights whose mean over the global batch is 1.

    Attributes:
        needs: fields that every sample must carry beside tokens and labels: "loss_mask", the weights above; stored
            values of a reference model, such as "reference_loss" a token.
        sequences: consecutive rows of a micro-batch that make one sample: 2 for a chosen and a rejected answer.
    """

    needs: ClassVar[frozenset[str]] = frozenset()
    sequences: ClassVar[int] = 1

    def __call__(self, token_losses: Tensor, fields: Mapping[str, Tensor]) -> Tensor:
        """The value of a micro-batch.

        Args:
            token_losses: fp32 [b, s / context-parallel size], the cross-entropy in nats of every token of this rank,
                with the z-loss where the recipe has one.
            fields: those of `needs`, each of the same shape.

        Returns:
            A scalar in nats, with a gradient.
        """
        raise NotImplementedError


class Offers(Protocol):
    """What a reader of training data says of its samples."""

    fields: Collection[str]
    sequences: int


def check_needs(objective: Objective, reader: Offers, recipe: Recipe) -> None:
    """Refuse an objective that needs what the data do not have.

    Raises:
        UserError: naming it.
    """
    name = recipe.training.objective
    missing = sorted(objective.needs - set(reader.fields))
    if missing:
        raise UserError(
            f"{name} needs {', '.join(missing)}, which the training data do not have",
            where="training.objective",
            fix="choose another objective, or data made for it",
        )
    if objective.sequences != reader.sequences:
        raise UserError(
            f"{name} needs {objective.sequences} sequences a sample, and the training data have {reader.sequences}",
            where="training.objective",
            fix="choose another objective, or data made for it",
        )
    if objective.needs and recipe.parallel.pipeline_model_parallel_size > 1:
        raise UserError(
            f"{name} needs {', '.join(sorted(objective.needs))}, which stages do not hand on",
            where="parallel.pipeline_model_parallel_size",
            fix="set it to 1",
        )


def as_factory(entry: Any) -> Callable[[Recipe], Objective]:
    """`entry`, which must be callable with a recipe.

    Raises:
        TypeError: it is not callable.
    """
    if not callable(entry):
        raise TypeError(f"an objective must be a class or a function of the recipe, not {type(entry).__name__}")
    return entry  # type: ignore[no-any-return]
