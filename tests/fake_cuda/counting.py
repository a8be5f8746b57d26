"""ATen operations inside a `with Work() as work:`, the bytes they move and their floating-point operations."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from tests.fake_cuda import synchronisations

# views, new memory and questions of the host move no data on the device
FREE = set(
    "view _unsafe_view transpose permute expand slice select t unsqueeze squeeze as_strided split split_with_sizes "
    "unsafe_split chunk unbind detach alias narrow unflatten movedim lift_fresh set_ device record_stream "
    "empty empty_like new_empty empty_strided new_empty_strided _local_scalar_dense".split()
)
OVERWRITTEN = {"copy_", "zero_", "fill_"}  # in place, without reading what was there
# these read as much of their first argument as they return
PARTLY_READ = {"embedding", "index", "index_select", "gather"}


@dataclass
class Total:
    """Sums over operations.

    Attributes:
        operations: how many.
        bytes: read and written, each element of an argument once.
        flops: 2 m n k for matrix products; attention counts as if it were not causal.
    """

    operations: int = 0
    bytes: int = 0
    flops: int = 0

    def __add__(self, other: Total) -> Total:
        return Total(self.operations + other.operations, self.bytes + other.bytes, self.flops + other.flops)


class Work(TorchDispatchMode):
    """Counts all operations that have a CUDA tensor, but `FREE` ones. Copies between host and device are noted as
    synchronisations, too.

    Attributes:
        parts: totals by what `part` returns, the name of the operation.
        collectives: totals by kind of collective; bytes are those of the tensors given to it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.parts: defaultdict[str, Total] = defaultdict(Total)
        self.collectives: defaultdict[str, Total] = defaultdict(Total)

    @property
    def total(self) -> Total:
        """All operations together, collectives left out."""
        return sum(self.parts.values(), Total())

    def part(self, name: str) -> str:
        """The part of the work that an operation belongs to."""
        return name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        name = func._overloadpacket.__name__
        if func.namespace == "c10d":
            self.collectives[name] += Total(1, sum(map(_size, _tensors((args, keywords)))))
        elif name not in FREE and any(tensor.is_cuda for tensor in _tensors((args, keywords, result))):
            total = Total(1, _moved(func, args, keywords, result), _flops(func, args, keywords, result))
            self.parts[self.part(name)] += total
            _note_copy(args, keywords, result)
        return result


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _size(tensor: torch.Tensor) -> int:
    """Bytes of a tensor's elements; those of an expanded one count once."""
    return min(tensor.numel() * tensor.itemsize, tensor.untyped_storage().nbytes())


def _moved(func: Any, args: Any, keywords: Any, result: Any) -> int:
    """Bytes that an operation reads from its arguments, and writes to them and to its results."""
    name = func._overloadpacket.__name__
    read = written = 0
    changed: set[int] = set()
    for number, argument in enumerate(func._schema.arguments):
        given = _tensors(keywords.get(argument.name, args[number] if number < len(args) else None))
        size = sum(map(_size, given))
        # fused optimizers are declared to change gradients, which they do where there is a loss scale
        if argument.is_write and argument.name != "grads":
            written += size
            changed.update(map(id, given))
            if argument.is_out or name in OVERWRITTEN:
                continue
        read += size
    fresh = sum(tensor.numel() * tensor.itemsize for tensor in _tensors(result) if id(tensor) not in changed)
    if name in PARTLY_READ:
        read = fresh + sum(map(_size, _tensors((args[1:], keywords))))
    return read + written + fresh


def _flops(func: Any, args: Any, keywords: Any, result: Any) -> int:
    if func._overloadpacket is torch.ops.aten._grouped_mm:  # torch 2.13 does not count it; every row has one expert
        return 2 * args[0].numel() * result.size(-1)
    # in place it is the same product, which torch does not count
    packet = torch.ops.aten.addmm if func._overloadpacket is torch.ops.aten.addmm_ else func._overloadpacket
    count = flop_registry.get(packet)
    return count(*args, **keywords, out_val=result) if count else 0


def _note_copy(args: Any, keywords: Any, result: Any) -> None:
    """Note a copy between host and device, unless the host was asked not to wait."""
    sources, targets = _tensors((args, keywords)), _tensors(result)
    asynchronous = keywords.get("non_blocking", False) or any(argument is True for argument in args)
    if not sources or not targets or asynchronous:
        return
    source, target = sources[-1], targets[0]
    scalar = source.dim() == 0 and len(sources) > 1  # goes along as an argument of the kernel
    if not scalar and {source.device.type, target.device.type} == {"cpu", "cuda"}:
        synchronisations.note(f"copy to {target.device.type}")
