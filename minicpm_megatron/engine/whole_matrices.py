"""Whole matrices for an optimizer whose ranks hold parts of them, under TP, EP, PP, CP and ZeRO 0 to 3.

Every weight has one rank that computes its update: the parts go there, the parts of the result come back. Weights are
dealt out over all ranks of a pipeline stage, the costly first, so that no product is made twice and all ranks are busy.
A round exchanges one weight a rank, which bounds the buffers. Without ZeRO replicas have the same parts: one sends, all
receive. Where a part is, each rank tells the others once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from minicpm_megatron.engine.zero.adapter import Adapter
from minicpm_megatron.model.config import MiniCPMConfig
from minicpm_megatron.model.fused_matrices import matrices_in
from minicpm_megatron.model.sharding import shard_spec
from minicpm_megatron.parallel import device
from minicpm_megatron.storage.sharded import ShardSpec


@dataclass(frozen=True)
class Part:
    """A flat range of a shard of a weight, as a rank holds it.

    Attributes:
        unit: number of the tensor that the rank's optimizer steps, among those that hold parts of such weights.
        offset: first element in that tensor, flat.
        spec: the shard.
        start, length: the range in the flat shard; length 0 says only that the tensor steps the weight.
    """

    unit: int
    offset: int
    spec: ShardSpec
    start: int
    length: int


@dataclass(frozen=True)
class Task:
    """One weight that one rank computes.

    Attributes:
        name, shape: of the whole weight.
        owner: rank in the group that computes.
        senders: (rank, part) that together are the whole weight, each element once, by rank.
        receivers: (rank, part) of all that hold a part, by rank.
    """

    name: str
    shape: tuple[int, ...]
    owner: int
    senders: tuple[tuple[int, Part], ...]
    receivers: tuple[tuple[int, Part], ...]


class WholeMatrices:
    """Brings the matrices of some muP roles together; every rank of a pipeline stage must call it alike.

    Args:
        config: the model's config.
        names, roles: of every parameter of this rank.
        wanted: the roles.
        zero: says where this rank keeps which part of a parameter.

    Attributes:
        group: the ranks that together hold the weights of this pipeline stage.
        dtype: in which products of matrices may be made: bf16 where a GPU trains in bf16, otherwise fp32.
    """

    def __init__(
        self,
        config: MiniCPMConfig,
        names: Mapping[Parameter, str],
        roles: Mapping[Parameter, str],
        wanted: Collection[str],
        zero: Adapter,
    ) -> None:
        self._config = config
        half = config.params_dtype == torch.bfloat16 and not device.on_cpu()
        self.dtype = torch.bfloat16 if half else torch.float32
        self.group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
        self._rank, self._size = dist.get_rank(self.group), dist.get_world_size(self.group)
        self._units: dict[int, int] = {}  # id of a stepped tensor -> its number
        mine: list[Part] = []
        for parameter, name in names.items():
            if roles[parameter] in wanted:
                spec = shard_spec(config, name)
                owner = zero.owner(parameter, roles[parameter])
                unit = self._units.setdefault(id(owner), len(self._units))
                mine.append(Part(unit, 0, spec, 0, 0))
                for piece in zero.pieces(parameter):
                    length = max(0, min(piece.master.numel(), spec.numel - piece.start))
                    mine.append(Part(unit, piece.offset, spec, piece.start, length))
        everyone: list[Any] = [None] * self._size
        dist.all_gather_object(everyone, mine, group=self.group)
        self._holders: dict[str, list[tuple[int, Part]]] = defaultdict(list)
        for rank, parts in enumerate(everyone):
            for part in parts:
                self._holders[part.spec.name].append((rank, part))
        self._rounds = cache(self._plan)

    @torch.no_grad()
    def transform(self, updates: Mapping[Tensor, Tensor], function: Callable[[str, Tensor], Tensor]) -> None:
        """Replace the matrices that `updates` hold parts of by what `function` makes of each whole one.

        Args:
            updates: tensor that the optimizer steps -> flat fp32 update of it, changed in place.
            function: (name, whole matrix [rows, columns]) -> the same shape.
        """
        by_unit = {self._units[id(tensor)]: update for tensor, update in updates.items()}
        for tasks in self._rounds(frozenset(by_unit)):
            self._round(tasks, by_unit, function)

    def _plan(self, units: frozenset[int]) -> list[list[Task]]:
        """The weights that the tensors `units` step, in rounds of at most one a rank."""
        names = [name for name, holders in self._holders.items() if any(part.unit in units for _, part in holders)]
        names.sort(key=lambda name: (-self._cost(name), name))
        tasks = [self._task(name, number % self._size) for number, name in enumerate(names)]
        return [tasks[start : start + self._size] for start in range(0, len(tasks), self._size)]

    def _cost(self, name: str) -> int:
        rows, columns = self._holders[name][0][1].spec.global_shape
        return rows * columns * min(rows, columns)

    def _task(self, name: str, owner: int) -> Task:
        holders = [(rank, part) for rank, part in self._holders[name] if part.length]
        replicas: dict[tuple[Any, ...], list[tuple[int, Part]]] = defaultdict(list)
        for rank, part in holders:
            replicas[part.spec.ranges, part.start, part.length].append((rank, part))
        # of equal parts the owner's own, or else that of a rank that is another one for another owner
        senders = [
            next((held for held in same if held[0] == owner), same[owner % len(same)]) for same in replicas.values()
        ]
        shape = self._holders[name][0][1].spec.global_shape
        return Task(name, shape, owner, tuple(sorted(senders, key=lambda held: held[0])), tuple(holders))

    def _round(
        self, tasks: Sequence[Task], updates: Mapping[int, Tensor], function: Callable[[str, Tensor], Tensor]
    ) -> None:
        me = self._rank
        own = next((task for task in tasks if task.owner == me), None)
        sent = [[_place(updates, part) for rank, part in task.senders if rank == me] for task in tasks]
        received = self._exchange(_by_owner(tasks, sent, self._size), _lengths(own.senders if own else (), self._size))
        back: list[list[Tensor]] = [[] for _ in range(self._size)]
        if own is not None:
            whole = _assemble(own, received)
            del received
            self._map(own.name, whole, function)
            shards: dict[tuple[Any, ...], Tensor] = {}
            for rank, part in own.receivers:
                if part.spec.ranges not in shards:
                    shards[part.spec.ranges] = part.spec.take(whole).reshape(-1)
                back[rank].append(shards[part.spec.ranges].narrow(0, part.start, part.length))
            del whole, shards  # as large as the weight each, and not needed while the results are on their way
        places = [[_place(updates, part) for rank, part in task.receivers if rank == me] for task in tasks]
        by_owner = _by_owner(tasks, places, self._size)
        mine = _flat(by_owner)
        results = self._exchange(back, [sum(place.numel() for place in each) for each in by_owner])
        for place, result in zip(mine, results.split([place.numel() for place in mine]), strict=True):
            place.copy_(result)

    def _exchange(self, sent: Sequence[Sequence[Tensor]], lengths: Sequence[int]) -> Tensor:
        """Send the tensors of `sent` to each rank, and return those from each rank, `lengths` elements, in one."""
        here = device.device()
        joined = [tensor.to(here) for tensor in _flat(sent)]
        outgoing = torch.cat(joined) if joined else torch.empty(0, device=here)
        if self._size == 1:
            return outgoing
        incoming = torch.empty(sum(lengths), device=here)
        counts = [sum(tensor.numel() for tensor in each) for each in sent]
        dist.all_to_all_single(incoming, outgoing, list(lengths), counts, group=self.group)
        return incoming

    def _map(self, name: str, whole: Tensor, function: Callable[[str, Tensor], Tensor]) -> None:
        for each, view in matrices_in(self._config, name, whole):
            view.copy_(function(each, view.reshape(-1, whole.size(1))).view_as(view))


def _place(updates: Mapping[int, Tensor], part: Part) -> Tensor:
    return updates[part.unit].narrow(0, part.offset, part.length)


def _by_owner(tasks: Sequence[Task], tensors: Sequence[list[Tensor]], ranks: int) -> list[list[Tensor]]:
    found: list[list[Tensor]] = [[] for _ in range(ranks)]
    for task, each in zip(tasks, tensors, strict=True):
        found[task.owner] = each
    return found


def _lengths(held: Iterable[tuple[int, Part]], ranks: int) -> list[int]:
    lengths = [0] * ranks
    for rank, part in held:
        lengths[rank] += part.length
    return lengths


def _flat(nested: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [tensor for each in nested for tensor in each]


def _assemble(task: Task, received: Tensor) -> Tensor:
    """The whole weight from what its senders sent, in their order."""
    shards: dict[tuple[Any, ...], tuple[ShardSpec, Tensor]] = {}
    parts = received.split([part.length for _, part in task.senders])
    for (_, part), values in zip(task.senders, parts, strict=True):
        _, shard = shards.setdefault(part.spec.ranges, (part.spec, received.new_empty(part.spec.numel)))
        shard.narrow(0, part.start, part.length).copy_(values)
    if len(shards) == 1:
        ((spec, shard),) = shards.values()
        if math.prod(task.shape) == spec.numel:
            return shard.view(task.shape)
    whole = received.new_empty(task.shape)
    for spec, shard in shards.values():
        spec.put(whole, shard.view(spec.shape))
    return whole
