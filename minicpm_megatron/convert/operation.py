"""Any recognised folder to any format: open the source, check everything, write the target, or leave nothing."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from minicpm_megatron import registry
from minicpm_megatron.convert.config_fields import read_json
from minicpm_megatron.convert.format import CONFIG, Format, in_order
from minicpm_megatron.convert.formats import FORMATS
from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.convert.mapping import Group
from minicpm_megatron.convert.our_checkpoint import open_checkpoint, write_checkpoint
from minicpm_megatron.convert.output_folder import atomic_folder, check_output, check_space
from minicpm_megatron.convert.rope import dynamic_note, fixed_rope
from minicpm_megatron.convert.source import Source, check_complete, open_published, read_tensor
from minicpm_megatron.convert.target_names import CHECKPOINTS, MEGATRON, targets
from minicpm_megatron.convert.text_settings import GENERATION, SpecialTokens, choose_tokens
from minicpm_megatron.convert.tokenizer_folder import (
    TokenizerFolder,
    check_vocabulary,
    copy_tokenizer,
    open_tokenizer,
)
from minicpm_megatron.convert.torch_dist import TORCH_DIST
from minicpm_megatron.convert.torch_dist.contents import METADATA
from minicpm_megatron.convert.torch_dist.folder import is_torch_dist
from minicpm_megatron.convert.torch_dist.source import open_torch_dist
from minicpm_megatron.convert.untying import untied_source
from minicpm_megatron.convert.weight_files import DTYPES, bytes_needed, write_weights
from minicpm_megatron.convert.weight_options import DEFAULT_DTYPE, DEFAULT_SHARD, DTYPE_NAMES
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import ModelRecipe, count_parameters
from minicpm_megatron.storage.atomic import write_json
from minicpm_megatron.storage.manifest import MANIFEST

_UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True)
class Conversion:
    """What was done.

    Attributes:
        source_format, target_format: megatron, torch_dist, or the name of a published format.
        output: the folder that was made.
        parameters: elements of the model, a tied head not counted twice.
        notes: things worth knowing that are no errors, one line each.
    """

    source_format: str
    target_format: str
    output: Path
    parameters: int
    notes: tuple[str, ...]


def recognise(folder: Path) -> str:
    """The format of a folder: megatron (ours, by manifest.json), torch_dist (by .metadata, or Megatron-LM's tracker) or
    a published one (by config.json).

    Nothing in the folder is executed to find out; auto_map, which names code, is ignored. Where a format of another
    package is identified as one of ours is, the folder is of ours.

    Raises:
        UserError: not a folder, or none of the formats.
    """
    where = str(folder)
    if not folder.is_dir():
        raise UserError("no such folder", where=where)
    if (folder / MANIFEST).is_file():
        return MEGATRON
    if is_torch_dist(folder):
        return TORCH_DIST
    if not (folder / CONFIG).is_file():
        inside = folder / "checkpoints"
        fix = f"give one of the checkpoints in {inside}" if inside.is_dir() else ""
        raise UserError(f"neither {MANIFEST}, {METADATA} nor {CONFIG}, so not a model", where=where, fix=fix)
    config = read_json(folder / CONFIG)
    kind, architectures = config.get("model_type"), config.get("architectures")
    broken: list[str] = []
    layouts: list[Format] = []
    layout: Format
    for layout in registry.FORMATS.loadable(broken):
        layouts.append(layout)
        if kind == layout.model_type and architectures in (None, [layout.architecture]):
            return layout.name
    known = ", ".join(f"{f.model_type} ({f.architecture})" for f in in_order(layouts))
    code = ", known only to code inside the folder, which is never run" if "auto_map" in config else ""
    raise UserError(
        f"model_type {kind!r} with architectures {architectures!r} is no known format{code}",
        where=str(folder / CONFIG),
        fix="; ".join((f"known are {known}", *broken)),
    )


def open_source(folder: Path, model: ModelRecipe | None = None) -> Source:
    """The model in `folder`, whatever format it is in; tensors are read later, one at a time.

    Args:
        model: the model of a torch_dist checkpoint that does not contain it; every other format does.

    Raises:
        UserError: see `recognise` and the format's own checks.
    """
    name = recognise(folder)
    if name == TORCH_DIST:
        return open_torch_dist(folder, model)
    if model is not None:
        raise UserError(
            f"a folder in the format {name} contains its model",
            where=str(folder),
            fix="leave --preset or --recipe out",
        )
    return open_checkpoint(folder) if name == MEGATRON else open_published(folder, FORMATS[name])


def parse_size(text: str) -> int:
    """Bytes in "5GB", "500MiB", "1_000_000".

    Raises:
        UserError: not a positive size.
    """
    match = re.fullmatch(r"([\d_]+(?:\.\d+)?) ?([KMG]i?B)?", text.strip(), flags=re.IGNORECASE)
    size = int(float(match[1].replace("_", "") or 0) * _UNITS[(match[2] or "").upper()]) if match else 0
    if size < 1:
        raise UserError(f"{text!r} is not a size", where="--max-shard-size", fix="for example 5GB or 500MB")
    return size


def convert(
    source_folder: Path,
    output: Path,
    target: str,
    *,
    dtype: str | None = None,
    max_shard_size: str = DEFAULT_SHARD,
    tokenizer: Path | None = None,
    overwrite: bool = False,
    untie: bool = False,
    rope_fixed: int | None = None,
    model: ModelRecipe | None = None,
    progress: bool = False,
) -> Conversion:
    """Convert the model in `source_folder` and write it to `output`, whole or not at all.

    Args:
        target: one of `targets`.
        dtype: fp32, bf16 or fp16 of a published target (default bf16) or of torch_dist (default fp32); our checkpoints
            are always fp32.
        max_shard_size: data bytes of one file of a published target.
        tokenizer: folder of tokenizer files; default is the one the source has or records.
        overwrite: replace a model that is already at `output`.
        untie: give a tied model a head of its own, equal to its embedding.
        rope_fixed: write dynamic RoPE as the one base of sequences of so many tokens; for a published target.
        model: the model of a torch_dist checkpoint that does not contain it.
        progress: show bytes, rate and remaining time on standard error.
    Raises:
        UserError: anything wrong with the input, the options or the place; `output` is then as it was.
    """
    if target not in targets():
        raise UserError(f"unknown format {target!r}", where="--to", fix=f"use one of {', '.join(targets())}")
    if dtype is not None and target == MEGATRON:
        raise UserError("checkpoints always hold fp32", where="--dtype", fix="leave it out")
    if dtype not in (None, *DTYPES):
        raise UserError(f"unknown type {dtype!r}", where="--dtype", fix=f"use one of {', '.join(DTYPES)}")
    if tokenizer is not None and target == TORCH_DIST:
        raise UserError("torch_dist has no place for a tokenizer", where="--tokenizer", fix="leave it out")
    if rope_fixed is not None and target in CHECKPOINTS:
        raise UserError(
            f"{target} keeps a model's own scaling", where="--rope-fixed", fix=f"it is for {', '.join(FORMATS)}"
        )
    shard_bytes = parse_size(max_shard_size)
    source = open_source(source_folder, model)
    if source.model.qk_layernorm and target == TORCH_DIST:
        raise UserError("the norm of queries and keys is not written", where=f"--to {target}", fix="use --to megatron")
    if untie:
        source = untied_source(source)
    if rope_fixed is not None:
        source = dataclasses.replace(source, model=fixed_rope(source.model, rope_fixed))
    check_output(output, source=source_folder, overwrite=overwrite)
    notes = list(source.notes)
    if target == TORCH_DIST:
        _write_torch_dist(source, output, dtype or "fp32", progress)
    else:
        to_publish = target != MEGATRON
        pieces, more = _tokenizer(tokenizer or source.tokenizer, source.model.vocab_size, to_publish=to_publish)
        notes += more
        tokens, other = choose_tokens(
            source.text, pieces.special_tokens if pieces else None, replaced=tokenizer is not None
        )
        notes += [other] if other else []
        if to_publish:
            notes += [note for note in (dynamic_note(source.model),) if note]
            _publish(source, output, FORMATS[target], dtype or DEFAULT_DTYPE, shard_bytes, pieces, tokens, progress)
        else:
            notes += [*source.left_behind, *_carried(source)]
            source = dataclasses.replace(source, text=source.text.replaced(tokens))
            _write_checkpoint(source, output, pieces, progress)
    return Conversion(source.format, target, output, _parameters(source), tuple(notes))


def _carried(source: Source) -> list[str]:
    if source.optimizer is None:
        return []
    step = source.optimizer.position.step
    return [f"optimizer state is carried over, at step {step}: in a run the folder is RUN/checkpoints/step-{step}"]


def _write_torch_dist(source: Source, output: Path, dtype: str, progress: bool) -> None:
    # here, since torch.distributed takes a second to import
    from minicpm_megatron.convert.torch_dist.write import write_torch_dist

    needed = DTYPES[dtype].itemsize * _parameters(source)
    check_space(output, needed)
    with atomic_folder(output, needed=needed) as folder:
        write_torch_dist(folder, source, dtype=dtype, progress=progress)


def _write_checkpoint(source: Source, output: Path, pieces: TokenizerFolder | None, progress: bool) -> None:
    kinds = 1 + len(source.optimizer.kinds if source.optimizer else ())
    needed = DTYPES["fp32"].itemsize * _parameters(source) * kinds
    check_space(output, needed)
    with atomic_folder(output, needed=needed) as folder:
        write_checkpoint(folder, source, tokenizer=pieces.folder if pieces else None, progress=progress)


def _tokenizer(folder: Path | None, vocab_size: int, *, to_publish: bool) -> tuple[TokenizerFolder | None, list[str]]:
    if folder is None:
        return None, ["no tokenizer is known for this model: give --tokenizer DIR to add its files"]
    if not folder.is_dir():
        raise UserError("no such tokenizer folder", where=str(folder), fix="give --tokenizer DIR")
    pieces = open_tokenizer(folder, to_publish=to_publish)
    return pieces, [note for note in (check_vocabulary(pieces, vocab_size), *pieces.notes()) if note]


def _publish(
    source: Source,
    output: Path,
    layout: Format,
    dtype: str,
    shard_bytes: int,
    pieces: TokenizerFolder | None,
    tokens: SpecialTokens,
    progress: bool,
) -> None:
    layout.check_kind(source.model, registry.FORMATS.loadable([]))
    config = layout.write_config(source.model, tokens, DTYPE_NAMES[dtype])
    groups = layout.export_groups(source.model)
    check_complete(source, {name for group in groups for name in group.canonical})
    shapes = {name: shape for group in groups for name, shape in group.published_shapes(source.model).items()}
    needed = bytes_needed(shapes, DTYPES[dtype].itemsize)
    check_space(output, needed)
    with atomic_folder(output, needed=needed) as folder:
        folder.mkdir()
        write_weights(folder, _stream(source, groups, shapes, dtype, progress), shapes, dtype, shard_bytes)
        write_json(folder / CONFIG, config)
        write_json(folder / GENERATION, source.text.with_tokens(tokens))
        if pieces:
            copy_tokenizer(pieces, folder)


def _stream(
    source: Source, groups: list[Group], shapes: dict[str, Shape], dtype: str, progress: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    itemsize = DTYPES[dtype].itemsize
    total = itemsize * sum(torch.Size(shape).numel() for shape in shapes.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc="writing", disable=not progress) as bar:
        for group in groups:
            tensors = [read_tensor(source, name, group.row.kind.shape(source.model)) for name in group.canonical]
            parts = group.to_published(tensors, source.model)
            # whatever was folded or cast is a copy: the original goes before the next tensor is read
            del tensors
            for name in group.published:
                yield name, parts.pop(name)
                bar.update(itemsize * torch.Size(shapes[name]).numel())


def _parameters(source: Source) -> int:
    return count_parameters(source.model).total
