"""Untying: a model whose LM head is its word embedding as one whose head begins as a copy of it (section 7.2).

The copy is exact, and head and embedding keep the multipliers they had (Table 7: embeddings times scale_emb, the hidden
state before the head divided by m), so the new model's logits are the old one's. The vocabulary's padding is no part of
a checkpoint and stays zero under every layout.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import Tensor

from minicpm_megatron.convert.mapping import EMBEDDING, HEAD
from minicpm_megatron.convert.rewriting import Rewrite
from minicpm_megatron.convert.source import Source, TensorSource
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe

NEW_ROLES = ("head",)  # muP groups of an untied model that a tied one lacks
_EMBEDDING, _HEAD = EMBEDDING.pattern, HEAD.pattern


def check_tied(source: Source) -> None:
    """Refuse a model with a head of its own, or whose tensors are not those of a tied one.

    Raises:
        UserError: naming what is there too much or not at all.
    """
    where = str(source.folder)
    if source.model.untie_embeddings_and_output_weights:
        raise UserError("the head has weights of its own already", where=where, fix="leave --untie out")
    names = source.tensors.names()
    for wrong, what in ((_EMBEDDING not in names, f"{_EMBEDDING} missing"), (_HEAD in names, f"{_HEAD} unexpected")):
        if wrong:
            raise UserError(f"the model is tied, and tensor {what}", where=where, fix="use another checkpoint")


def untied_model(tied: ModelRecipe) -> ModelRecipe:
    """The shape of the untied model; everything but its head is the tied one's."""
    return tied.model_copy(update={"untie_embeddings_and_output_weights": True})


def untie_rewrite(*, copy_moments: bool) -> Rewrite:
    """What comes of each tensor: itself and, of the embedding [vocabulary, hidden_size], the head, which is equal.

    Args:
        copy_moments: give the head the moments of the tied embedding, which are those of the sum of the gradients that
            embedding and head have from now on apart. False: zeros.
    """

    def weight(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield name, tensor
        if name == _EMBEDDING:
            yield _HEAD, tensor

    def moment(name: str, kind: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        yield name, value
        if name == _EMBEDDING:
            # zeros of one element's storage, written out when it is their turn
            yield _HEAD, value if copy_moments else value.new_zeros(()).expand(value.shape)

    return Rewrite(weight, moment)


class UntiedTensors:
    """The tensors of a tied model with a head that is read from the embedding."""

    def __init__(self, tied: TensorSource) -> None:
        self._tied = tied

    def names(self) -> list[str]:
        """All tensors, the head last."""
        return [*self._tied.names(), _HEAD]

    def read(self, name: str) -> Tensor:
        """One whole tensor in fp32."""
        return self._tied.read(_EMBEDDING if name == _HEAD else name)


def untied_source(tied: Source) -> Source:
    """The model of `tied` as an untied one, weights only.

    Raises:
        UserError: see `check_tied`.
    """
    check_tied(tied)
    tensors = UntiedTensors(tied.tensors)
    return dataclasses.replace(tied, model=untied_model(tied.model), tensors=tensors, optimizer=None)
