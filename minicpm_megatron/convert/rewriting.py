"""A model in any folder -> a checkpoint of ours that holds what is made of it, tensor by tensor.

Weights, moments and random state are streamed: in memory is one tensor of the old model with what comes of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from minicpm_megatron.convert.source import Source, TensorSource
from minicpm_megatron.recipe import ModelRecipe, count_parameters
from minicpm_megatron.storage.atomic import fsync_directory
from minicpm_megatron.storage.checksum import FileRecord
from minicpm_megatron.storage.manifest import write_manifest
from minicpm_megatron.storage.sharded import (
    WEIGHT,
    CheckpointReader,
    Fragment,
    ShardSpec,
    rank_file,
    write_fragments,
)

_BYTES = 4  # fp32


@dataclass(frozen=True)
class Rewrite:
    """What comes of each tensor of a model.

    Attributes:
        weight: (name, whole tensor) -> names and whole tensors of the new model, each when it is asked for; tensors
            that are equal may share storage.
        moment: (name, exp_avg or exp_avg_sq, whole moment) -> those of the tensors that `weight` makes of it.
    """

    weight: Callable[[str, Tensor], Iterator[tuple[str, Tensor]]]
    moment: Callable[[str, str, Tensor], Iterator[tuple[str, Tensor]]]


def _moments(source: Source) -> list[str]:
    """Kinds of optimizer state that the source has of every tensor."""
    reader = source.tensors
    if not isinstance(reader, CheckpointReader):
        return []
    names = reader.names()
    return [kind for kind in reader.kinds(names[0]) if kind != WEIGHT and all(kind in reader.kinds(n) for n in names)]


def has_moments(source: Source) -> bool:
    """Whether the source is a checkpoint with optimizer state."""
    return bool(_moments(source))


def bytes_of(source: Source, model: ModelRecipe) -> int:
    """Data bytes of `model` made of `source`: fp32 weights, and two moments where the source has them."""
    return _BYTES * count_parameters(model).total * (3 if has_moments(source) else 1)


def write_rewritten(
    folder: Path,
    source: Source,
    rewrite: Rewrite,
    *,
    state: dict[str, Any],
    facts: dict[str, Any],
    total_bytes: int,
    progress: bool,
) -> None:
    """Write the checkpoint `folder`, which must not exist; whoever calls gives it its final name.

    Args:
        state, facts: of the manifest.
        total_bytes: what will be written, for the progress.
        progress: show bytes, rate and remaining time on standard error.
    """
    folder.mkdir(parents=True)
    files = []
    kinds = _moments(source)
    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        for number, name in enumerate(source.tensors.names()):
            path = folder / f"tensor-{number:05}.safetensors"
            files.append(write_fragments(path, _fragments(source.tensors, name, kinds, rewrite), {}))
            bar.update(files[-1].size)
    files += _random_state(source, folder)
    write_manifest(folder, files, state=state, facts=facts)
    fsync_directory(folder)


def _fragments(tensors: TensorSource, name: str, kinds: list[str], rewrite: Rewrite) -> Iterator[Fragment]:
    """What comes of one tensor: weights, then each of the `kinds` of moments."""
    for new, tensor in rewrite.weight(name, tensors.read(name)):
        yield _whole(new, WEIGHT, tensor)
    if isinstance(tensors, CheckpointReader):
        for kind in kinds:
            for new, moment in rewrite.moment(name, kind, tensors.read(name, kind)):
                yield _whole(new, kind, moment)


def _whole(name: str, kind: str, tensor: Tensor) -> Fragment:
    return Fragment(ShardSpec(name, tuple(tensor.shape)), kind, 0, tensor.reshape(-1))


def _random_state(source: Source, folder: Path) -> list[FileRecord]:
    """What each rank of the old run kept for itself, in files of the same names."""
    files: list[FileRecord] = []
    if isinstance(source.tensors, CheckpointReader):
        while tensors := source.tensors.rank_tensors(len(files)):
            files.append(write_fragments(folder / rank_file(len(files)), (), tensors))
    return files
