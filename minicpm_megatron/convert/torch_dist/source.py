"""Torch_dist checkpoints as a source: everything is checked by the table of contents before a tensor is read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.convert.mapping import EMBEDDING, HEAD
from minicpm_megatron.convert.source import OptimizerState, Source
from minicpm_megatron.convert.text_settings import TEXT_STATE, of_state
from minicpm_megatron.convert.torch_dist import TORCH_DIST
from minicpm_megatron.convert.torch_dist.architecture import check_args, model_of_args
from minicpm_megatron.convert.torch_dist.chunks import ChunkReader
from minicpm_megatron.convert.torch_dist.common_state import NOTE_KEY, CommonState, read_common_state
from minicpm_megatron.convert.torch_dist.contents import METADATA, Contents, read_contents
from minicpm_megatron.convert.torch_dist.folder import check_integrity, checkpoint_folder
from minicpm_megatron.convert.torch_dist.placement import (
    MASTERS,
    MOMENTS,
    Places,
    has_optimizer,
    place_state,
    place_weights,
)
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, build_section, count_parameters

_NO_MODEL = "give minicpm convert the --preset or --recipe of the model that was trained"


class PlacedTensors:
    """The tensors of a folder under our names.

    Args:
        reader: of the folder.
        places: where each tensor is.
        vocabulary: rows of embedding and head without padding.
    """

    def __init__(self, reader: ChunkReader, places: Places, vocabulary: int) -> None:
        self._reader, self._places, self._vocabulary = reader, places, vocabulary
        for regions in places.values():
            for region in regions:
                reader.check(region)

    def names(self) -> list[str]:
        """All tensors."""
        return list(self._places)

    def read(self, name: str) -> Tensor:
        """One whole tensor in fp32, without padding."""
        parts = [self._reader.read(region).float() for region in self._places[name]]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        return tensor[: self._vocabulary] if name in (EMBEDDING.pattern, HEAD.pattern) else tensor


def open_torch_dist(folder: Path, model: ModelRecipe | None = None) -> Source:
    """A folder of Megatron-LM's (its newest checkpoint), or one checkpoint of it.

    Args:
        model: what was trained; needed where the checkpoint's arguments lack MiniCPM's multipliers.

    Raises:
        UserError: it is no torch_dist checkpoint, is damaged, or is not one of this model.
    """
    folder = checkpoint_folder(folder)
    check_integrity(folder)
    contents = read_contents(folder)
    common = read_common_state(folder, contents)
    where = str(folder / METADATA)
    model = model or _recorded_model(common, where)
    if model is None:
        raise UserError("the checkpoint does not contain MiniCPM's multipliers", where=str(folder), fix=_NO_MODEL)
    check_args(common.args, model, where)
    _check_size(folder, model)
    weights, padding = place_weights(contents, model, common.args, where)
    # fp32 where the optimizer has it; a weight that is fp32 itself has no other
    masters = {name: regions for kind in MASTERS for name, regions in place_state(contents, weights, kind).items()}
    reader = ChunkReader(folder, contents)
    optimizer, left_behind = _optimizer(contents, weights, common, reader, model)
    return Source(
        format=TORCH_DIST,
        folder=folder,
        model=model,
        tensors=PlacedTensors(reader, weights | masters, model.vocab_size),
        origin={"format": TORCH_DIST, "folder": str(folder.resolve()), "iteration": common.iteration},
        optimizer=optimizer,
        text=of_state(common.note.get(TEXT_STATE), model.vocab_size, f"{where}: {NOTE_KEY}"),
        notes=(f"{padding} rows of padding of the vocabulary are left out",) if padding else (),
        left_behind=left_behind,
    )


def _check_size(folder: Path, model: ModelRecipe) -> None:
    """Refuse a model that the files cannot hold at a byte a parameter, before a name is made for each tensor."""
    parameters, size = count_parameters(model).total, sum(path.stat().st_size for path in folder.iterdir())
    if parameters > size:
        raise UserError(f"the model has {parameters:,} parameters, and the folder {size:,} bytes", where=str(folder))


def _recorded_model(common: CommonState, where: str) -> ModelRecipe | None:
    """The model that a conversion of ours has noted, or that the arguments describe."""
    noted = common.note.get("model")
    if isinstance(noted, dict):
        return build_section(ModelRecipe, noted, where=f"{where}: {NOTE_KEY}")
    return model_of_args(common.args, where)


def _optimizer(
    contents: Contents, weights: Places, common: CommonState, reader: ChunkReader, model: ModelRecipe
) -> tuple[OptimizerState | None, tuple[str, ...]]:
    """Adam's moments where every weight has both, and else why they are left behind."""
    if not has_optimizer(contents):
        return None, ()
    places = {kind: place_state(contents, weights, kind) for kind in MOMENTS}
    if any(found.keys() != weights.keys() for found in places.values()):
        return None, (
            "optimizer state is left behind: it is in flat buckets, not by name; Megatron-LM saves it by name with"
            " --dist-ckpt-optim-fully-reshardable",
        )
    if common.updates is None or common.iteration is None:
        return None, ("optimizer state is left behind: the checkpoint does not contain its count of updates",)
    tensors = {kind: PlacedTensors(reader, found, model.vocab_size) for kind, found in places.items()}
    samples, tokens = _consumed(common.args)
    position = RunState(step=common.iteration, updates=common.updates, samples=samples, tokens=tokens)
    return OptimizerState(MOMENTS, lambda name, kind: tensors[kind].read(name), position), ()


def _consumed(args: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """Samples and tokens that the run had read, None each where the arguments do not say so."""
    samples, length = args.get("consumed_train_samples"), args.get("seq_length")
    if type(samples) is not int or samples < 0:
        return None, None
    return samples, samples * length if type(length) is int else None
