"""Our own checkpoints as a source and as a target."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from minicpm_megatron.convert.recorded_tokenizer import recorded_tokenizer
from minicpm_megatron.convert.source import Source
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, build_section
from minicpm_megatron.storage.manifest import MANIFEST, problems
from minicpm_megatron.storage.sharded import CheckpointReader, write_single

MEGATRON = "megatron"


def open_checkpoint(folder: Path) -> Source:
    """A checkpoint folder; its tokenizer is found as `recorded_tokenizer` says.

    Raises:
        UserError: the manifest is malformed, or a file is not what was written.
    """
    damage = problems(folder)
    if damage:
        raise UserError(f"the checkpoint is damaged: {damage[0]}", where=str(folder), fix="use another checkpoint")
    reader = CheckpointReader(folder)
    manifest = reader.manifest
    model = build_section(ModelRecipe, manifest["model"], where=str(folder / MANIFEST))
    tokenizer, notes = recorded_tokenizer(manifest, folder)
    return Source(
        format=MEGATRON,
        folder=folder,
        model=model,
        tensors=reader,
        tokenizer=tokenizer,
        notes=notes,
    )


def write_checkpoint(output: Path, source: Source, *, tokenizer: Path | None, progress: bool) -> None:
    """A checkpoint in fp32: weights at step 0, or the step and Adam's moments that the source can give."""
    state = {
        "step": 0,
        "tokens": 0,
        "data": {"tokenizer": str(tokenizer.resolve()) if tokenizer else None},
        "origin": dict(source.origin),
        **(source.optimizer.position if source.optimizer else {}),
    }
    moments = functools.partial(_moments, source)
    write_single(output, _tensors(source, progress), source.model.model_dump(mode="json"), state, moments)


def _tensors(source: Source, progress: bool) -> Iterator[tuple[str, torch.Tensor]]:
    with tqdm(source.tensors.names(), unit="tensor", desc="writing", disable=not progress) as names:
        for name in names:
            yield name, source.tensors.read(name)


def _moments(source: Source, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if source.optimizer:
        for kind in source.optimizer.kinds:
            yield kind, source.optimizer.read(name, kind)
