"""Global tensors stored as flat fragments of shards, so that what one layout wrote any other can read.

A *shard* is the part of a global tensor that one tensor-parallel rank holds; a *fragment* is a flat range of a shard,
as ZeRO divides it over data-parallel ranks. Every fragment says where it belongs in global terms, so that nothing in
a file refers to the layout that wrote it. Files are safetensors: nothing in them can be executed.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import fsync_directory
from minicpm_megatron.storage.checksum import FileRecord
from minicpm_megatron.storage.manifest import read_manifest, records, write_manifest
from minicpm_megatron.storage.safetensors_file import open_safetensors, write_safetensors

TABLE = "fragments"
RANK_TENSOR = "rank/"
WEIGHT = "param"


@dataclass(frozen=True)
class ShardSpec:
    """A part of a global tensor.

    Attributes:
        name: Megatron-Core's parameter name.
        global_shape: of the whole tensor, without vocabulary padding.
        dim: the shard joins `ranges` of the global tensor along it; None: the shard is the whole tensor.
        ranges: (start, length) along `dim`. Two where a fused tensor is divided part by part (SwiGLU's gate and up).
    """

    name: str
    global_shape: tuple[int, ...]
    dim: int | None = None
    ranges: tuple[tuple[int, int], ...] = ()

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the shard without padding."""
        if self.dim is None:
            return self.global_shape
        shape = list(self.global_shape)
        shape[self.dim] = sum(length for _, length in self.ranges)
        return tuple(shape)

    @property
    def numel(self) -> int:
        """Elements of the shard without padding."""
        return math.prod(self.shape)

    def take(self, whole: Tensor, padded_shape: tuple[int, ...] | None = None) -> Tensor:
        """This shard of the global tensor, with rows of zeros at its end up to `padded_shape`."""
        if self.dim is None:
            shard = whole
        else:
            shard = torch.cat([whole.narrow(self.dim, start, length) for start, length in self.ranges], dim=self.dim)
        if padded_shape is None or tuple(shard.shape) == tuple(padded_shape):
            return shard
        padded = shard.new_zeros(padded_shape)
        padded[: shard.size(0)] = shard
        return padded

    def put(self, whole: Tensor, shard: Tensor) -> None:
        """Write this shard into the global tensor."""
        if self.dim is None:
            whole.copy_(shard)
            return
        offset = 0
        for start, length in self.ranges:
            whole.narrow(self.dim, start, length).copy_(shard.narrow(self.dim, offset, length))
            offset += length


@dataclass(frozen=True)
class Fragment:
    """A flat range of a shard.

    Attributes:
        spec: the shard.
        kind: "param" for the weight, or the name of an optimizer moment.
        start: first element in the flat shard.
        tensor: 1-D values; what lies beyond the shard's end is padding and is not stored.
    """

    spec: ShardSpec
    kind: str
    start: int
    tensor: Tensor

    @property
    def valid(self) -> Tensor:
        """The values without padding, possibly none."""
        return self.tensor[: max(0, self.spec.numel - self.start)]


@dataclass(frozen=True)
class _Stored:
    spec: ShardSpec
    start: int
    numel: int
    file: Path
    key: str


def write_fragments(path: Path, fragments: Iterable[Fragment], rank_tensors: dict[str, Tensor]) -> FileRecord:
    """Write one rank's fragments and its own tensors (random state) to a safetensors file.

    Raises:
        OSError: the disk is full or fails; no file is left behind.
    """
    table, tensors = [], []
    for number, fragment in enumerate(fragments):
        values = fragment.valid
        if values.numel():
            spec = fragment.spec
            key = f"{number}/{fragment.kind}/{spec.name}"
            table.append(
                {
                    "key": key,
                    "kind": fragment.kind,
                    "name": spec.name,
                    "shape": spec.global_shape,
                    "dim": spec.dim,
                    "ranges": spec.ranges,
                    "start": fragment.start,
                    "numel": values.numel(),
                }
            )
            tensors.append((key, values))
    tensors += [(RANK_TENSOR + name, tensor) for name, tensor in rank_tensors.items()]
    return write_safetensors(path, tensors, {TABLE: json.dumps(table, separators=(",", ":"))})


class CheckpointReader:
    """The global tensors of a checkpoint folder; needs no process group and holds one tensor at a time.

    Args:
        folder: a folder with manifest.json. Checksums are the business of `manifest.problems`.

    Raises:
        UserError: the manifest or a file is missing or malformed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self._open: dict[Path, Any] = {}
        self._stored: dict[tuple[str, str], list[_Stored]] = {}
        for record in records(self.manifest, self.folder):
            if record.name.endswith(".safetensors"):
                self._read_table(self.folder / record.name)

    def _handle(self, path: Path) -> Any:
        if path not in self._open:
            self._open[path] = open_safetensors(path, fix="restore it or use another checkpoint")
        return self._open[path]

    def _read_table(self, path: Path) -> None:
        try:
            table = json.loads((self._handle(path).metadata() or {})[TABLE])
            for entry in table:
                stored = _stored(entry, path)
                self._stored.setdefault((stored.spec.name, str(entry["kind"])), []).append(stored)
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError):
            raise UserError("the table of fragments is malformed", where=str(path)) from None

    def names(self) -> list[str]:
        """Parameters, in the order they were written."""
        return [name for name, kind in self._stored if kind == WEIGHT]

    def kinds(self, name: str) -> list[str]:
        """What is stored of a parameter: "param", and its moments where they were saved."""
        return [kind for stored, kind in self._stored if stored == name]

    def shape(self, name: str) -> tuple[int, ...]:
        """Global shape of a parameter."""
        return self._find(name, WEIGHT)[0].spec.global_shape

    def _find(self, name: str, kind: str) -> list[_Stored]:
        try:
            return self._stored[(name, kind)]
        except KeyError:
            raise UserError(f"holds no {kind} of {name}", where=str(self.folder)) from None

    def read(self, name: str, kind: str = WEIGHT) -> Tensor:
        """A whole global tensor.

        Raises:
            UserError: it is not stored, or the fragments do not cover it exactly once.
        """
        stored = self._find(name, kind)
        shape = stored[0].spec.global_shape
        by_spec: dict[ShardSpec, list[_Stored]] = {}
        for piece in stored:
            by_spec.setdefault(piece.spec, []).append(piece)
        _check_tiling(name, shape, list(by_spec), self.folder)
        for spec, pieces in by_spec.items():  # before memory is taken for what a header only claims to hold
            self._check_cover(spec, kind, pieces)
        whole: Tensor | None = None
        for spec, pieces in by_spec.items():
            shard = self._assemble(spec, kind, pieces)
            if spec.dim is None:
                return shard
            if whole is None:
                whole = shard.new_empty(shape)
            spec.put(whole, shard)
        assert whole is not None
        return whole

    def read_shard(self, spec: ShardSpec, kind: str = WEIGHT, padded_shape: tuple[int, ...] | None = None) -> Tensor:
        """One shard, whatever shards were written; only its own fragments are read where they were written alike."""
        stored = self._find(spec.name, kind)
        if stored[0].spec.global_shape != spec.global_shape:
            raise UserError(
                f"{spec.name} is {stored[0].spec.global_shape} in the checkpoint and {spec.global_shape} in the model",
                where=str(self.folder),
                fix="use the recipe's model of the checkpoint",
            )
        same = [piece for piece in stored if piece.spec == spec]
        if same:
            shard = self._assemble(spec, kind, same)
            return ShardSpec(spec.name, spec.shape).take(shard, padded_shape)
        return spec.take(self.read(spec.name, kind), padded_shape)

    def _assemble(self, spec: ShardSpec, kind: str, pieces: list[_Stored]) -> Tensor:
        self._check_cover(spec, kind, pieces)
        flat: Tensor | None = None
        for piece in pieces:
            values: Tensor = self._handle(piece.file).get_tensor(piece.key)
            if piece.numel == spec.numel:
                return values.view(spec.shape)
            if flat is None:
                flat = values.new_empty(spec.numel)
            flat.narrow(0, piece.start, piece.numel).copy_(values)
        assert flat is not None
        return flat.view(spec.shape)

    def _check_cover(self, spec: ShardSpec, kind: str, pieces: list[_Stored]) -> None:
        """Refuse fragments that do not hold every element of the shard exactly once, by what the files' headers say."""
        position = 0
        for piece in sorted(pieces, key=lambda piece: piece.start):
            try:
                held = self._handle(piece.file).get_slice(piece.key).get_shape()
            except SafetensorError as error:
                raise UserError(f"{kind} of {spec.name} is missing: {error}", where=str(piece.file)) from None
            if piece.start != position or held != [piece.numel]:
                raise UserError(
                    f"fragments of {kind} of {spec.name} overlap or leave a gap at element {position}",
                    where=str(piece.file),
                )
            position += piece.numel
        if position != spec.numel:
            raise UserError(f"{kind} of {spec.name} ends at element {position} of {spec.numel}", where=str(self.folder))

    def rank_tensors(self, rank: int) -> dict[str, Tensor]:
        """What rank `rank` stored for itself; empty where there was no such rank."""
        path = self.folder / rank_file(rank)
        if path.name not in {record.name for record in records(self.manifest, self.folder)}:
            return {}
        handle = self._handle(path)
        keys = [key for key in handle.keys() if key.startswith(RANK_TENSOR)]  # noqa: SIM118
        return {key.removeprefix(RANK_TENSOR): handle.get_tensor(key) for key in keys}


def _stored(entry: Any, path: Path) -> _Stored:
    """An entry of a file's table; raises ValueError and its like for one that describes no part of a tensor."""
    shape = tuple(map(operator.index, entry["shape"]))
    ranges = tuple((operator.index(start), operator.index(length)) for start, length in entry["ranges"])
    dim, start, numel = entry["dim"], operator.index(entry["start"]), operator.index(entry["numel"])
    if dim is not None and not 0 <= operator.index(dim) < len(shape):
        raise ValueError("no such dimension")
    if min((start, numel, *shape, *itertools.chain(*ranges)), default=0) < 0:
        raise ValueError("a negative size")
    return _Stored(ShardSpec(str(entry["name"]), shape, dim, ranges), start, numel, path, str(entry["key"]))


def _check_tiling(name: str, shape: tuple[int, ...], specs: list[ShardSpec], folder: Path) -> None:
    """Refuse shards that do not cover the global tensor exactly once."""
    first = specs[0]
    whole = len(specs) == 1
    if first.dim is not None:
        ranges = sorted(part for spec in specs for part in spec.ranges if part[1])
        ends = itertools.accumulate((length for _, length in ranges), initial=0)
        whole = [*(start for start, _ in ranges), shape[first.dim]] == list(ends)
    if not whole or any((spec.global_shape, spec.dim) != (shape, first.dim) for spec in specs):
        raise UserError(f"{name} is not stored whole: its shards overlap or leave a gap", where=str(folder))


def rank_file(rank: int) -> str:
    """Name of the file that rank `rank` writes."""
    return f"rank-{rank:05}.safetensors"


def write_single(
    folder: Path,
    tensors: Iterable[tuple[str, Tensor]],
    model: dict[str, Any],
    state: dict[str, Any],
    moments: Callable[[str], Iterable[tuple[str, Tensor]]] = lambda name: (),
) -> None:
    """A checkpoint by one process, for instance from a Hugging Face folder.

    Args:
        folder: must not exist; whoever calls renames it to its final name.
        tensors: (canonical name, whole tensor), one file a tensor so that only one is in memory, with its moments.
        model: fields of ModelRecipe.
        state: JSON values with "step".
        moments: name -> (kind, whole tensor); without it the checkpoint has weights alone.
    """
    folder.mkdir(parents=True)
    files = []
    for number, (name, tensor) in enumerate(tensors):
        pieces = _whole(name, itertools.chain([(WEIGHT, tensor)], moments(name)))
        files.append(write_fragments(folder / f"tensor-{number:05}.safetensors", pieces, {}))
    write_manifest(folder, files, state=state, facts={"model": model})
    fsync_directory(folder)


def _whole(name: str, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Fragment]:
    for kind, tensor in tensors:
        yield Fragment(ShardSpec(name, tuple(tensor.shape)), kind, 0, tensor.reshape(-1))
