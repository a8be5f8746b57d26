"""Any source's tensors as the shards of a layout, for a run that begins with them."""

from __future__ import annotations

from torch import Tensor

from minicpm_megatron.convert.source import Source
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.sharded import WEIGHT, ShardSpec


class SourceShards:
    """Weights of a published folder, read as `storage.sharded.CheckpointReader` reads those of a checkpoint of ours.

    In memory are one tensor, or a layer's experts where the source has them stacked.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._names = frozenset(source.tensors.names())

    def read_shard(self, spec: ShardSpec, kind: str = WEIGHT, padded_shape: tuple[int, ...] | None = None) -> Tensor:
        """One shard in fp32, with rows of zeros at its end up to `padded_shape`.

        Raises:
            UserError: the source has no such tensor, or one of another shape.
        """
        where = str(self._source.folder)
        if kind != WEIGHT or spec.name not in self._names:
            raise UserError(f"holds no {kind} of {spec.name}", where=where)
        whole = self._source.tensors.read(spec.name)
        if tuple(whole.shape) != spec.global_shape:
            raise UserError(
                f"{spec.name} is {tuple(whole.shape)} there and {spec.global_shape} in the model", where=where
            )
        return spec.take(whole, padded_shape)
