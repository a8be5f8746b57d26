"""Whole matrices for an optimizer whose ranks hold parts of them, under TP, EP, PP, CP and ZeRO 0 to 3.

Every weight has one rank that computes its update: the parts go there, and the parts of the result come back. Weights
are dealt out over all ranks of a pipeline stage, the costly first, so that no product is made twice and all ranks are
busy. A round exchanges one weight a rank, so that no rank holds more than about three weights. Without ZeRO,
data-parallel replicas hold the same parts: one replica exchanges its part with the owner, then broadcasts the result to
the other replicas. At start-up all ranks exchange lists of the parts that they hold.
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
from minicpm_megatron.recipe.matrices import update_cost
from minicpm_megatron.storage.sharded import ShardSpec


@dataclass(frozen=True)
class Part:
    """A flat range of a shard of a weight, as a rank holds it.

    Attributes:
        unit: number of the tensor that the rank's optimizer steps, among those that hold parts of such weights.
        offset: first element in that tensor, flat.
        spec: the shard.
        start, length: the range in the flat shard. Length 0: this rank holds nothing of the weight, but its optimizer
            steps the tensor at the same time as others do, and so takes part in the exchange.
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
        replicas: for each sender the (rank, part) of all that hold the same as it does, the sender among them.
    """

    name: str
    shape: tuple[int, ...]
    owner: int
    senders: tuple[tuple[int, Part], ...]
    replicas: tuple[tuple[tuple[int, Part], ...], ...]

    @property
    def at_home(self) -> bool:
        """True if the owner holds all parts of the weight, so that no rank needs to send any."""
        return all(rank == self.owner for rank, _ in self.senders)


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
        self._replica_groups: dict[tuple[int, ...], Any] = {}  # ranks that hold the same -> their group
        for group in (
            parallel_state.get_data_parallel_group(with_context_parallel=True),
            parallel_state.get_expert_data_parallel_group(),
        ):
            ranks = sorted(dist.get_group_rank(self.group, rank) for rank in dist.get_process_group_ranks(group))
            self._replica_groups[tuple(ranks)] = group

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
        return update_cost(rows, columns)

    def _task(self, name: str, owner: int) -> Task:
        by_part: dict[tuple[Any, ...], list[tuple[int, Part]]] = defaultdict(list)
        for rank, part in self._holders[name]:
            if part.length:
                by_part[part.spec.ranges, part.start, part.length].append((rank, part))
        # of equal parts the owner takes its own; otherwise replicas take turns, so that none sends to all owners
        chosen = [
            (next((held for held in same if held[0] == owner), same[owner % len(same)]), tuple(same))
            for same in by_part.values()
        ]
        chosen.sort(key=lambda pair: pair[0][0])
        senders, replicas = tuple(held for held, _ in chosen), tuple(same for _, same in chosen)
        shape = self._holders[name][0][1].spec.global_shape
        found = sum(part.length for _, part in senders)
        if found != math.prod(shape):
            raise RuntimeError(f"ranks hold {found} of the {math.prod(shape)} elements of {name}")
        return Task(name, shape, owner, senders, replicas)

    def _round(
        self, tasks: Sequence[Task], updates: Mapping[int, Tensor], function: Callable[[str, Tensor], Tensor]
    ) -> None:
        own = next((task for task in tasks if task.owner == self._rank), None)
        moves = not all(task.at_home for task in tasks)
        places = [[_place(updates, part) for rank, part in task.senders if rank == self._rank] for task in tasks]
        by_owner = _by_owner(tasks, places, self._size)
        lengths = [sum(place.numel() for place in each) for each in by_owner]
        received = self._exchange(by_owner, _lengths(own.senders if own else (), self._size), moves)
        back: list[list[Tensor]] = [[] for _ in range(self._size)]
        if own is not None:
            whole = _assemble(own, received)
            del received
            self._map(own.name, whole, function)
            shards: dict[tuple[Any, ...], Tensor] = {}
            for rank, part in own.senders:
                if part.spec.ranges not in shards:
                    shards[part.spec.ranges] = part.spec.take(whole).reshape(-1)
                back[rank].append(shards[part.spec.ranges].narrow(0, part.start, part.length))
            del whole, shards  # as large as the weight each, and not needed while the results are on their way
        results = self._exchange(back, lengths, moves)
        mine = _flat(by_owner)
        for place, result in zip(mine, results.split([place.numel() for place in mine]), strict=True):
            place.copy_(result)
        for task in tasks:
            self._pass_on(task, updates)

    def _pass_on(self, task: Task, updates: Mapping[int, Tensor]) -> None:
        """Give what a sender of the task got back to its replicas."""
        for (sender, _), same in zip(task.senders, task.replicas, strict=True):
            mine = next((part for rank, part in same if rank == self._rank), None)
            if len(same) > 1 and mine is not None:
                group = self._replica_groups[tuple(rank for rank, _ in same)]
                dist.broadcast(_place(updates, mine), dist.get_global_rank(self.group, sender), group=group)

    def _exchange(self, sent: Sequence[Sequence[Tensor]], lengths: Sequence[int], moves: bool) -> Tensor:
        """Send the tensors of `sent` to each rank, and return those from each rank, `lengths` elements, in one.

        Args:
            moves: whether any rank sends to another.
        """
        here = device.device()
        joined = [tensor.to(here) for tensor in _flat(sent)]
        outgoing = torch.cat(joined) if joined else torch.empty(0, device=here)
        if not moves:
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
