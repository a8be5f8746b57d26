"""Torch_dist checkpoints as a target: weights alone, for Megatron-LM's --load."""

from __future__ import annotations

import functools
import io
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from tqdm import tqdm

from minicpm_megatron.convert.fused import Shape
from minicpm_megatron.convert.source import Source, check_complete, read_tensor
from minicpm_megatron.convert.text_settings import TEXT_STATE
from minicpm_megatron.convert.torch_dist.architecture import args_of_model
from minicpm_megatron.convert.torch_dist.chunks import Region
from minicpm_megatron.convert.torch_dist.common_state import COMMON_OBJECT, NOTE_KEY
from minicpm_megatron.convert.torch_dist.folder import BACKEND, BACKEND_FILE, RELEASE, TRACKER
from minicpm_megatron.convert.torch_dist.names import stacked
from minicpm_megatron.convert.torch_dist.placement import canonical_shapes
from minicpm_megatron.convert.weight_files import DTYPES, cast_weight
from minicpm_megatron.storage.atomic import write_bytes, write_json

# where a value goes, and what makes it
_Value = tuple[WriteItem, Callable[[], Any]]
# modules of a layer that have an `_extra_state`, which is empty without Transformer Engine; Megatron-Core misses it
_LINEAR = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")


class _Writer(FileSystemWriter):
    """torch's writer of one file, which leaves the name of the (temporary) folder out of `.metadata`."""

    def __init__(self, folder: Path) -> None:
        # nothing is read ahead, so that few tensors are in memory; whoever calls flushes the files
        super().__init__(folder, sync_files=False, per_thread_copy_ahead=0)

    def storage_meta(self) -> None:
        return None


class _Planner(DefaultSavePlanner):
    """A plan whose values are made when it is their turn.

    Args:
        values: what is written, in order, each with a function that makes its value.
    """

    def __init__(self, values: list[_Value]) -> None:
        super().__init__(flatten_state_dict=False)
        self.plan = SavePlan([item for item, _ in values])
        self._make = {item.index: make for item, make in values}

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._make[write_item.index]()


def write_torch_dist(output: Path, source: Source, *, dtype: str, progress: bool) -> None:
    """Write a folder that Megatron-LM's --load takes: a tracker, and a `release` checkpoint beside it.

    The weights have Megatron-Core's names with stacked layers, and the vocabulary has no padding: Megatron-Core makes
    as much as the layout needs when it loads.

    Args:
        output: must not exist; whoever calls gives it its final name.
        dtype: fp32, bf16 or fp16.

    Raises:
        UserError: the source's tensors are not those of its model, or do not fit `dtype`.
        OSError: the disk is full or fails.
    """
    folder = output / RELEASE
    folder.mkdir(parents=True)
    shapes = canonical_shapes(source.model)
    check_complete(source, set(shapes))
    with tqdm(total=len(shapes), unit="tensor", desc="writing", disable=not progress) as bar:

        def make(name: str) -> Tensor:
            bar.update()
            return cast_weight(name, read_tensor(source, name, shapes[name]), dtype)

        regions = {name: stacked(name, source.model) for name in shapes}
        weights = (
            _weight(region, shapes[name], dtype, functools.partial(make, name)) for name, region in regions.items()
        )
        values: list[_Value] = [*weights, *_extra_states(regions), _common_state(source)]
        planner, writer = _Planner(values), _Writer(folder)
        [plan], metadata = planner.create_global_plan([planner.plan])
        [plan] = writer.prepare_global_plan([plan])
        try:
            results = writer.write_data(plan, planner).wait()
        except RuntimeError as error:
            # torch 2.13 closes its archive after a failed write and then reports the archive, not the disk
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        writer.finish(metadata, [results])
    write_json(folder / BACKEND_FILE, BACKEND)
    write_bytes(output / TRACKER, RELEASE.encode())


def _weight(region: Region, shape: Shape, dtype: str, make: Callable[[], Tensor]) -> _Value:
    """A tensor of ours as a chunk of the global tensor that Megatron-Core makes of all layers and experts."""
    # a layer's chunk is [1, ...], an expert's [1, 1, ...]
    sizes = (*(1 for _ in region.at), *shape)
    chunk = ChunkStorageMetadata(torch.Size((*region.at, *(0 for _ in shape))), torch.Size(sizes))
    whole = torch.Size((*region.sizes, *shape))
    data = TensorWriteData(chunk, TensorProperties(DTYPES[dtype]), whole)
    item = WriteItem(MetadataIndex(region.key, chunk.offsets), WriteItemType.SHARD, tensor_data=data)
    return item, lambda: make().reshape(sizes)


def _extra_states(regions: Mapping[str, Region]) -> Iterator[_Value]:
    for name, (key, at, sizes) in regions.items():
        if name.endswith(_LINEAR):
            place = "_".join(".".join(map(str, numbers)) for numbers in (at, sizes))
            yield _object(f"{key.removesuffix('weight')}_extra_state/shard_{place}", None)


def _common_state(source: Source) -> _Value:
    state = {
        "args": Namespace(**args_of_model(source.model)),
        "checkpoint_version": 3.0,
        "iteration": 0,
        # how the names and shapes of the weights were made, by which Megatron-LM makes those that it asks for
        "content_metadata": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
        NOTE_KEY: {"model": source.model.model_dump(mode="json"), TEXT_STATE: source.text.state()},
    }
    return _object(COMMON_OBJECT, state)


def _object(name: str, value: Any) -> _Value:
    def make() -> io.BytesIO:
        content = io.BytesIO()
        torch.save([value], content)  # a list, as Megatron-Core saves the objects that a rank has of one name
        return content

    return WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO), make
