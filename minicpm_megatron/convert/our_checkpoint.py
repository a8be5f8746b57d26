"""Our own checkpoints as a source and as a target."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from minicpm_megatron.checkpoint.run_state import RunState
from minicpm_megatron.convert.recorded_tokenizer import recorded_tokenizer
from minicpm_megatron.convert.source import Source
from minicpm_megatron.convert.target_names import MEGATRON
from minicpm_megatron.convert.text_settings import of_state
from minicpm_megatron.convert.weight_files import is_finite
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, build_section
from minicpm_megatron.storage.manifest import MANIFEST, problems
from minicpm_megatron.storage.sharded import CheckpointReader, write_single


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
    where = str(folder / MANIFEST)
    model = build_section(ModelRecipe, manifest.get("model"), where=where)
    blocks, tensors = model.num_layers * (model.num_moe_experts or 1), len(reader.names())
    if blocks > tensors:  # before a name is made for each
        raise UserError(f"layers and experts are {blocks} in all, for {tensors} tensors", where=where)
    state = RunState.of(manifest, where)
    tokenizer, notes = recorded_tokenizer(manifest, state, folder)
    return Source(
        format=MEGATRON,
        folder=folder,
        model=model,
        tensors=reader,
        tokenizer=tokenizer,
        text=of_state(state.text, model.vocab_size, where),
        notes=notes,
    )


def write_checkpoint(output: Path, source: Source, *, tokenizer: Path | None, progress: bool) -> None:
    """A checkpoint in fp32: weights at step 0, or the step and Adam's moments that the source can give."""
    position = source.optimizer.position if source.optimizer else RunState(step=0)
    state = dataclasses.replace(
        position,
        tokens=position.tokens or 0,
        origin=dict(source.origin),
        text=source.text.state(),
        tokenizer=str(tokenizer.resolve()) if tokenizer else None,
    )
    moments = functools.partial(_moments, source)
    write_single(output, _tensors(source, progress), source.model.model_dump(mode="json"), state.to_json(), moments)


def _tensors(source: Source, progress: bool) -> Iterator[tuple[str, torch.Tensor]]:
    with tqdm(source.tensors.names(), unit="tensor", desc="writing", disable=not progress) as names:
        for name in names:
            tensor = source.tensors.read(name)
            if not is_finite(tensor):
                raise UserError(f"tensor {name} has values that are not finite", where=str(source.folder))
            yield name, tensor
            del tensor  # or this name would hold it while the next one is read


def _moments(source: Source, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if source.optimizer:
        for kind in source.optimizer.kinds:
            yield kind, source.optimizer.read(name, kind)
