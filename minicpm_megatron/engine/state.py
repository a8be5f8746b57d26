"""Weights and optimizer state of a rank as fragments of global tensors, out of and into every ZeRO stage.

A fragment is a flat range of the rank's shard of a global tensor, in fp32 (the master weight, the optimizer's moments).
Written that way, a checkpoint says nothing of DeepSpeed's flat buffers, and loads into any layout and stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from megatron.core import parallel_state
from torch import Tensor
from torch.nn import Parameter

from minicpm_megatron.engine import experts
from minicpm_megatron.engine.engine import Engine
from minicpm_megatron.engine.zero.adapter import Piece, is_tied_copy
from minicpm_megatron.model.sharding import shard_spec
from minicpm_megatron.storage.sharded import WEIGHT, Fragment, ShardSpec


class ShardReader(Protocol):
    """Where weights and moments are loaded from; a `CheckpointReader` is one."""

    def read_shard(self, spec: ShardSpec, kind: str, padded_shape: tuple[int, ...] | None) -> Tensor:
        """One shard in fp32, with rows of zeros at its end up to `padded_shape`."""


class EngineState:
    """Reads and writes the state of an `Engine`, whatever its ZeRO stage and precision."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.inner = engine, engine.zero.inner

    def owned(self) -> Iterator[tuple[Parameter, ShardSpec, Piece]]:
        """What this rank answers for: together the ranks' pieces hold every element of the model once."""
        for parameter, spec in self._parameters():
            if is_tied_copy(parameter):
                continue
            if spec.dim is None and parallel_state.get_tensor_model_parallel_rank() != 0:
                continue
            if self.engine.zero.divided or experts.replica_of(parameter) == 0:
                for piece in self.engine.zero.pieces(parameter):
                    yield parameter, spec, piece

    def fragments(self) -> Iterator[Fragment]:
        """What this rank must save."""
        for parameter, spec, piece in self.owned():
            yield Fragment(spec, WEIGHT, piece.start, piece.master.detach())
            state = self.inner.state.get(piece.owner, {})
            for kind in self._moments(parameter):
                if kind in state:
                    moment = state[kind].view(-1).narrow(0, piece.offset, piece.master.numel())
                    yield Fragment(spec, kind, piece.start, moment.detach())

    def updates(self) -> int:
        """Optimizer steps taken so far, as the optimizer counts them for Adam's bias correction and its like."""
        return max((int(state["step"]) for state in self.inner.state.values() if "step" in state), default=0)

    @torch.no_grad()
    def load(
        self, reader: ShardReader, updates: int | None, on_progress: Callable[[str], None] = lambda name: None
    ) -> None:
        """Take weights and, unless `updates` is None, the optimizer's moments from a checkpoint of any layout.

        Args:
            on_progress: called with the name of each parameter before it is read.
        """
        if updates:
            self._allocate_moments(updates)
        elif updates == 0:
            self.inner.state.clear()  # an engine that goes back to its start has some
        for parameter, spec in self._parameters():
            on_progress(spec.name)
            shape = self.engine.zero.shape(parameter)
            self.engine.zero.set_weights(parameter, reader.read_shard(spec, WEIGHT, shape))
            if updates:
                for kind in self._moments(parameter):
                    flat = reader.read_shard(spec, kind, shape).view(-1)
                    for piece in self.engine.zero.pieces(parameter):
                        target = self.inner.state[piece.owner][kind].view(-1)
                        target = target.narrow(0, piece.offset, piece.master.numel())
                        target.copy_(flat.narrow(0, piece.start, piece.master.numel()))

    def _parameters(self) -> Iterator[tuple[Parameter, ShardSpec]]:
        for parameter, name in self.engine.names.items():
            yield parameter, shard_spec(self.engine.config, name)

    def _moments(self, parameter: Parameter) -> tuple[str, ...]:
        return self.engine.optimizer_spec.moments_for(self.engine.roles[parameter])

    def _allocate_moments(self, updates: int) -> None:
        owners: dict[int, tuple[Tensor, tuple[str, ...]]] = {}
        for parameter in self.engine.names:
            for piece in self.engine.zero.pieces(parameter):
                owners[id(piece.owner)] = piece.owner, self._moments(parameter)  # those of its group have one role
        for owner, kinds in owners.values():
            state = self.inner.state[owner]
            for kind in kinds:
                state.setdefault(kind, torch.zeros_like(owner.data))
            state["step"] = torch.tensor(float(updates), device=owner.device)
