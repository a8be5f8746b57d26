"""Where tensors come from: anything that lists canonical names and reads one whole tensor at a time.

Our checkpoint and every published folder look the same from here, so each target is written from any source.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.convert.config_fields import read_json
from minicpm_megatron.convert.format import CONFIG, Format
from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.convert.mapping import EMBEDDING, HEAD, ROUTER, Group
from minicpm_megatron.convert.text_settings import TextSettings, read_text_settings
from minicpm_megatron.convert.weight_files import WeightFolder
from minicpm_megatron.data.tokenizers import has_tokenizer
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe

_UNTIED = (
    "exported as a tied model, and its head is no longer its embedding: it comes back untied, with a head of its own"
)
# rows compared at a time when deciding whether head and embedding are one tensor: a few MB, not two vocabularies
_BLOCK_ROWS = 1024


class TensorSource(Protocol):
    """Un-sharded tensors under our canonical (Megatron-Core's) names."""

    def names(self) -> list[str]:
        """All tensors."""

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor in fp32."""


@dataclass(frozen=True)
class OptimizerState:
    """Adam's state beside the weights, and where the run stood.

    Attributes:
        kinds: of state, for instance exp_avg.
        read: (name, kind) -> whole tensor in fp32.
        position: step, updates, and samples and tokens where they are known.
    """

    kinds: tuple[str, ...]
    read: Callable[[str, str], torch.Tensor]
    position: RunState


@dataclass(frozen=True)
class Source:
    """A model that was found in a folder.

    Attributes:
        format: megatron, torch_dist, or the name of a published format.
        tokenizer: the folder of tokenizer files that belongs to it, None when unknown.
        text: its end tokens and settings for generation.
        origin: facts worth keeping about where it came from, JSON values.
        optimizer: what a checkpoint of ours can take over beside the weights; a `CheckpointReader` has its own.
        notes: things worth knowing about the weights, one line each.
        left_behind: training state that could not be read, and why, one line each.
    """

    format: str
    folder: Path
    model: ModelRecipe
    tensors: TensorSource
    tokenizer: Path | None = None
    text: TextSettings = TextSettings()
    origin: Mapping[str, Any] = field(default_factory=dict)
    optimizer: OptimizerState | None = None
    notes: tuple[str, ...] = ()
    left_behind: tuple[str, ...] = ()


class PublishedTensors:
    """A published folder read as canonical tensors, one group at a time.

    A group of several canonical tensors is read once, and those not asked for yet are held. A model has an expert's
    two weights one after the other, so that two groups of a mixture are asked for in turns.
    """

    def __init__(self, weights: WeightFolder, groups: list[Group], model: ModelRecipe) -> None:
        self._weights, self._model = weights, model
        self._groups = {name: group for group in groups for name in group.canonical}
        self._held: list[dict[str, torch.Tensor]] = []

    def names(self) -> list[str]:
        """Canonical names, in reading order."""
        return list(self._groups)

    def read(self, name: str) -> torch.Tensor:
        """One canonical tensor in fp32."""
        found = next((held for held in self._held if name in held), None)
        if found is None:
            del self._held[:-1]  # with the one that is read now there are two in memory
            group = self._groups[name]
            parts = [self._weights.read(part).float() for part in group.published]
            found = group.to_canonical(parts, self._model)
            self._held.append(found)
        tensor = found.pop(name)
        self._held = [held for held in self._held if held]
        return tensor


def open_published(folder: Path, layout: Format) -> Source:
    """A folder in a published format, every tensor's presence, shape and type checked from the headers.

    Raises:
        UserError: the configuration or the weights are not what the format says they are.
    """
    where = str(folder / CONFIG)
    config = read_json(folder / CONFIG)
    declared = layout.read_config(config, where)
    weights = WeightFolder(folder)
    _check_size(layout, declared, weights, where)
    noted_tied = layout.noted_tied(config)
    model = _with_true_tie(declared, layout, weights, noted=noted_tied)
    groups = layout.import_groups(model)
    _check_tensors(weights, groups, model, head=_head_and_embedding(layout, model)[0])
    return Source(
        format=layout.name,
        folder=folder,
        model=model,
        tensors=PublishedTensors(weights, groups, model),
        tokenizer=folder if has_tokenizer(folder) else None,
        text=read_text_settings(folder, config, model.vocab_size, where),
        origin={"format": layout.name, "folder": str(folder.resolve())},
        notes=(_UNTIED,) if noted_tied and model.untie_embeddings_and_output_weights else (),
    )


def _check_size(layout: Format, model: ModelRecipe, weights: WeightFolder, where: str) -> None:
    """Refuse a number of layers or experts that the files cannot hold, before a name is made for each.

    Raises:
        UserError: there are more than tensors.
    """
    tensors = len(weights.names())
    if model.num_layers > tensors:
        raise UserError(f"num_hidden_layers says {model.num_layers}, and the folder has {tensors} tensors", where=where)
    experts = model.num_moe_experts or 0
    if experts > tensors:  # as it may be where a layer's experts are one tensor
        router = next(row.published[0] for row in layout.table(model) if row.kind == ROUTER).replace("*", "0", 1)
        held = weights.shape(router)[0] if router in weights.names() else 0
        if held != experts:
            raise UserError(f"{layout.experts_key} says {experts}, and {router} has rows for {held}", where=where)


def _head_and_embedding(layout: Format, model: ModelRecipe) -> tuple[str, str]:
    names = {row.kind: row.published[0] for row in layout.table(model)}
    return names[HEAD], names[EMBEDDING]


def _with_true_tie(model: ModelRecipe, layout: Format, weights: WeightFolder, *, noted: bool) -> ModelRecipe:
    """Decide from the tensors whether head and embedding are one: the flag alone is written in too many ways."""
    head, embedding = _head_and_embedding(layout, model)
    names = set(weights.names())
    declared_tied = not model.untie_embeddings_and_output_weights
    # a head that merely starts as a copy of the embedding (the 128K model's) stays a head unless the note says more
    if not {head, embedding} <= names or not (declared_tied or noted):
        return model
    equal = _same_up_to_folds(model, layout, weights)
    if declared_tied and not equal:
        raise UserError(
            f"tie_word_embeddings is true, and {head} differs from {embedding}",
            where=str(weights.folder / CONFIG),
            fix="set tie_word_embeddings to false to import both",
        )
    return model.model_copy(update={"untie_embeddings_and_output_weights": not equal})


def _same_up_to_folds(model: ModelRecipe, layout: Format, weights: WeightFolder) -> bool:
    head, embedding = _head_and_embedding(layout, model)
    if weights.shape(head) != weights.shape(embedding):
        return False
    folds = {row.published[0]: row.fold(model) for row in layout.table(model) if row.fold}
    ratio = folds.get(head, 1.0) / folds.get(embedding, 1.0)
    # folded and stored, each side was rounded twice; near zero the spacing of numbers no longer shrinks with them
    limits = torch.finfo(weights.dtype(head))
    relative, absolute = (4 * limits.eps, 2 * limits.smallest_normal * limits.eps) if layout.folds else (0.0, 0.0)
    blocks = zip(weights.row_blocks(head, _BLOCK_ROWS), weights.row_blocks(embedding, _BLOCK_ROWS), strict=True)
    return all(
        torch.allclose(ours.float(), other.float() * ratio, rtol=relative, atol=absolute) for ours, other in blocks
    )


def _check_tensors(weights: WeightFolder, groups: list[Group], model: ModelRecipe, head: str) -> None:
    expected = {name: shape for group in groups for name, shape in group.published_shapes(model).items()}
    present = set(weights.names())
    if absent := [name for name in expected if name not in present]:
        more = f" and {len(absent) - 1} more" if len(absent) > 1 else ""
        raise UserError(f"tensor {absent[0]}{more} missing", where=str(weights.folder))
    tied_head = set() if model.untie_embeddings_and_output_weights else {head}
    for name in sorted(present - set(expected) - tied_head):
        # old exports carry the rotary table, which follows from rope_theta
        if not name.endswith(".rotary_emb.inv_freq"):
            raise UserError(f"unexpected tensor {name}", where=str(weights.path(name)))
    for name, shape in expected.items():
        if weights.shape(name) != shape:
            raise UserError(
                f"tensor {name} has shape {list(weights.shape(name))}, the configuration says {list(shape)}",
                where=str(weights.path(name)),
            )
        weights.dtype(name)


def check_complete(source: Source, expected: set[str]) -> None:
    """Refuse a source that lacks one of the `expected` tensors, or has another.

    Raises:
        UserError: naming the first of them.
    """
    present = set(source.tensors.names())
    for what, names in (("missing", expected - present), ("unexpected", present - expected)):
        if names:
            raise UserError(f"tensor {min(names)} {what}", where=str(source.folder))


def read_tensor(source: Source, name: str, shape: Shape) -> torch.Tensor:
    """One whole tensor in fp32.

    Raises:
        UserError: its shape is not the model's, `shape`.
    """
    tensor = source.tensors.read(name)
    if tuple(tensor.shape) != shape:
        raise UserError(
            f"tensor {name} has shape {list(tensor.shape)}, the model says {list(shape)}", where=str(source.folder)
        )
    return tensor
