"""Weights and optimizer state of a rank as fragments of global tensors, out of and into every ZeRO stage.

A fragment is a flat range of the rank's shard of a global tensor, in fp32 (the master weight, Adam's two moments).
Written that way, a checkpoint says nothing of DeepSpeed's flat buffers, and loads into any layout and stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from minicpm_megatron.engine import experts
from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.model.sharding import shard_spec
from minicpm_megatron.storage.sharded import WEIGHT, Fragment, ShardSpec

MOMENTS = ("exp_avg", "exp_avg_sq")


class ShardReader(Protocol):
    """Where weights and moments are loaded from; a `CheckpointReader` is one."""

    def read_shard(self, spec: ShardSpec, kind: str, padded_shape: tuple[int, ...] | None) -> Tensor:
        """One shard in fp32, with rows of zeros at its end up to `padded_shape`."""


@dataclass(frozen=True)
class Piece:
    """Where this rank keeps a flat range of one parameter's shard.

    Attributes:
        start: first element of the range in the flat shard.
        master: 1-D fp32 view of the range's master weights.
        owner: the tensor by which the inner optimizer knows its state.
        offset: first element of the range in `owner`, flat.
    """

    start: int
    master: Tensor
    owner: Tensor
    offset: int


class EngineState:
    """Reads and writes the state of an `Engine`, whatever its ZeRO stage and precision."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        optimizer = engine.optimizer
        # the torch optimizer inside DeepSpeed's wrapper, or the optimizer itself where there is none
        self.inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        self._unwrapped_masters = _masters_of_unfused(optimizer)

    def owned(self) -> Iterator[tuple[Parameter, ShardSpec, Piece]]:
        """What this rank answers for: together the ranks' pieces hold every element of the model once."""
        for parameter, spec in self._parameters():
            if getattr(parameter, "ds_pipe_replicated", False):  # the first stage answers for what the last ties to
                continue
            if spec.dim is None and parallel_state.get_tensor_model_parallel_rank() != 0:
                continue
            if self._partitioned(parameter) or experts.replica_of(parameter) == 0:
                for piece in self._pieces(parameter):
                    yield parameter, spec, piece

    def fragments(self) -> Iterator[Fragment]:
        """What this rank must save."""
        for _, spec, piece in self.owned():
            yield Fragment(spec, WEIGHT, piece.start, piece.master.detach())
            state = self.inner.state.get(piece.owner, {})
            for kind in MOMENTS:
                if kind in state:
                    moment = state[kind].view(-1).narrow(0, piece.offset, piece.master.numel())
                    yield Fragment(spec, kind, piece.start, moment.detach())

    def updates(self) -> int:
        """Optimizer steps taken so far (Adam's bias correction counts them)."""
        return max((int(state["step"]) for state in self.inner.state.values() if "step" in state), default=0)

    @torch.no_grad()
    def load(
        self, reader: ShardReader, updates: int | None, on_progress: Callable[[str], None] = lambda name: None
    ) -> None:
        """Take weights and, unless `updates` is None, Adam's moments from a checkpoint of any layout.

        Args:
            on_progress: called with the name of each parameter before it is read.
        """
        if updates:
            self._allocate_moments(updates)
        elif updates == 0:
            self.inner.state.clear()  # an engine that goes back to its start has some
        for parameter, spec in self._parameters():
            on_progress(spec.name)
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            self._load_weights(parameter, reader.read_shard(spec, WEIGHT, shape))
            if updates:
                for kind in MOMENTS:
                    flat = reader.read_shard(spec, kind, shape).view(-1)
                    for piece in self._pieces(parameter):
                        target = self.inner.state[piece.owner][kind].view(-1)
                        target = target.narrow(0, piece.offset, piece.master.numel())
                        target.copy_(flat.narrow(0, piece.start, piece.master.numel()))

    def _parameters(self) -> Iterator[tuple[Parameter, ShardSpec]]:
        for parameter, name in self.engine.names.items():
            yield parameter, shard_spec(self.engine.config, name)

    @staticmethod
    def _partitioned(parameter: Parameter) -> bool:
        return hasattr(parameter, "ds_id") or hasattr(parameter, "_hp_mapping")

    def _pieces(self, parameter: Parameter) -> list[Piece]:
        if hasattr(parameter, "ds_id"):
            return self._stage3_piece(parameter)
        if hasattr(parameter, "_hp_mapping"):
            mapping = parameter._hp_mapping
            if mapping is None:  # this rank's partition holds no part of it
                return []
            owner = self.inner.param_groups[mapping.param_group_index]["params"][0]
            address = mapping.hp_fragment_address
            return [Piece(mapping.lp_fragment_address.start, mapping.hp_fragment, owner, address.start)]
        master = self._unwrapped_masters(parameter)
        return [Piece(0, master.data.view(-1), master, 0)]

    def _stage3_piece(self, parameter: Any) -> list[Piece]:
        optimizer = self.engine.optimizer
        group, address, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
        owner = optimizer.fp32_partitioned_groups_flat[group]
        size = parameter.ds_tensor.ds_numel
        start = size * parallel_state.get_data_parallel_rank(with_context_parallel=True)
        # the last partitions may be padding in part or whole
        valid = max(0, min(size, parameter.ds_numel - start))
        return [Piece(start, owner.data.narrow(0, address, valid), owner, address)] if valid else []

    def _load_weights(self, parameter: Any, shard: Tensor) -> None:
        flat = shard.view(-1)
        for piece in self._pieces(parameter):
            piece.master.copy_(flat.narrow(0, piece.start, piece.master.numel()))
            if hasattr(parameter, "ds_id"):
                parameter.ds_tensor.data.narrow(0, 0, piece.master.numel()).copy_(piece.master)
                parameter.ds_secondary_tensor = None  # ZeRO++'s second copy, made anew from this one
        if not hasattr(parameter, "ds_id"):
            parameter.data.copy_(shard)

    def _allocate_moments(self, updates: int) -> None:
        owners: dict[int, Tensor] = {}
        for parameter in self.engine.names:
            for piece in self._pieces(parameter):
                owners[id(piece.owner)] = piece.owner
        for owner in owners.values():
            state = self.inner.state[owner]
            for kind in MOMENTS:
                state.setdefault(kind, torch.zeros_like(owner.data))
            state["step"] = torch.tensor(float(updates), device=owner.device)


def _masters_of_unfused(optimizer: Any) -> Callable[[Parameter], Tensor]:
    """Parameter -> its fp32 master where DeepSpeed keeps one a parameter (bf16 at ZeRO 0), else the parameter."""
    if not hasattr(optimizer, "fp32_groups"):
        return lambda parameter: parameter
    low = [parameter for group in optimizer.fp16_groups for parameter in group]
    high = [parameter for group in optimizer.fp32_groups for parameter in group]
    masters = {id(parameter): master for parameter, master in zip(low, high, strict=True)}
    return lambda parameter: masters[id(parameter)]
