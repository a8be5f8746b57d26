"""`Adapter`: what differs between DeepSpeed's optimizers, as the engine and its state use it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import deepspeed
import torch
from torch import Tensor
from torch.nn import Parameter

from minicpm_megatron.engine.zero.stand_in import standing_in
from minicpm_megatron.errors import require
from minicpm_megatron.recipe import Layout, Recipe

TRIED = "0.19.8"
"""Version of DeepSpeed for which the adapters are written (requirements.txt pins it)."""


@dataclass(frozen=True)
class Update:
    """What one optimizer step did.

    Attributes:
        gradient_norm: 2-norm over all parameters of all ranks before clipping; inf or nan where a gradient was.
        applied: False when a gradient was not finite and the weights were left as they were.
    """

    gradient_norm: float
    applied: bool


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


def is_tied_copy(parameter: Any) -> bool:
    """Whether an earlier pipeline stage has the same parameter, so that it is measured and saved there."""
    return getattr(parameter, "ds_pipe_replicated", False)


class Adapter(ABC):
    """One kind of DeepSpeed optimizer.

    `choose.choose_adapter` makes it before DeepSpeed starts, and `attach` then checks what DeepSpeed has built.

    Args:
        recipe, layout: what is run, and on how many ranks.
        config: the resolved DeepSpeed JSON.

    Attributes:
        builds: the class that DeepSpeed builds; None where it leaves the torch optimizer as it is.
        optimizer_class: `builds`, or the subclass that is built in its place.
        divided: whether every data-parallel rank keeps pieces of its own of each parameter.
        averages_over_context: whether DeepSpeed averages the gradients of context-parallel ranks, which each have a
            part of every sample's tokens; otherwise it sums them.
        optimizer: DeepSpeed's optimizer, once attached.
        inner: the torch optimizer, whose state holds the moments, once attached.
    """

    builds: ClassVar[type | None]
    divided: ClassVar[bool] = True

    def __init__(self, recipe: Recipe, layout: Layout, config: dict[str, Any]) -> None:
        self.recipe, self.layout, self.config = recipe, layout, config
        self.optimizer_class = self.builds
        self.averages_over_context = False
        self.optimizer: Any = None
        self.inner: torch.optim.Optimizer

    def prepare_model(self, model: torch.nn.Module, dtype: torch.dtype, mpu: Any) -> None:
        """Called before DeepSpeed starts, for what it would do wrongly with a model of parameters in `dtype`."""
        return

    def stand_in(self) -> AbstractContextManager[None]:
        """While DeepSpeed starts: have it build `optimizer_class` where it names `builds`."""
        if self.builds is None or self.optimizer_class is None or self.optimizer_class is self.builds:
            return nullcontext()
        return standing_in(self.builds, self.optimizer_class)

    def attach(self, engine: Any, inner: torch.optim.Optimizer, update: Callable[[], None]) -> None:
        """Take over what DeepSpeed has built.

        Args:
            engine: a DeepSpeedEngine.
            inner: the torch optimizer that it was given.
            update: ends a step of the engine: DeepSpeed's own clipping, update and clearing of gradients.

        Raises:
            UserError: the optimizer is of another class than `optimizer_class`.
        """
        wanted = type(inner) if self.optimizer_class is None else self.optimizer_class
        found = type(engine.optimizer)
        stage, precision = self.recipe.deepspeed.zero_stage, self.recipe.training.precision
        require(
            found is wanted,
            "deepspeed",
            f"DeepSpeed {deepspeed.__version__} made {found.__name__} for ZeRO {stage} in {precision}, where the"
            f" engine knows only {wanted.__name__} of DeepSpeed {TRIED}",
            f"install deepspeed {TRIED}, or remove from deepspeed.config what chooses another optimizer",
        )
        self.engine, self.optimizer, self.inner, self._update = engine, engine.optimizer, inner, update

    @abstractmethod
    def gradient_norm(self) -> float:
        """Return the norm that `step` would report, without stepping; inf or nan where a gradient is not finite."""

    @abstractmethod
    def discard(self) -> None:
        """Drop the accumulated gradients; weights, moments and Adam's count of steps keep every bit."""

    @abstractmethod
    def pieces(self, parameter: Any) -> list[Piece]:
        """Return where this rank keeps master weights and moments of its shard of a parameter; [] if it keeps none."""

    def owner(self, parameter: Any, group: str) -> Tensor:
        """Return the tensor by which the inner optimizer steps a parameter of the group called `group`.

        It is the `owner` of the parameter's pieces, also where this rank keeps none.
        """
        # ZeRO 1 and 2 have one flat tensor a group
        found: Tensor = next(each["params"][0] for each in self.inner.param_groups if each["name"] == group)
        return found

    @abstractmethod
    def gradient(self, parameter: Any, piece: Piece) -> Tensor:
        """Return the gradient of a piece, 1-D, between a step's last backward and its update."""

    @abstractmethod
    def step(self) -> Update:
        """Clip, and update unless a gradient is not finite."""

    def shape(self, parameter: Any) -> tuple[int, ...]:
        """Return the shape of this rank's shard of a parameter."""
        return tuple(parameter.shape)

    def set_weights(self, parameter: Any, shard: Tensor) -> None:
        """Overwrite a parameter and its master weights by `shard`, fp32 of the shape that `shape` returns."""
        self._set_masters(parameter, shard)
        parameter.data.copy_(shard)

    def _set_masters(self, parameter: Parameter, shard: Tensor) -> None:
        flat = shard.view(-1)
        for piece in self.pieces(parameter):
            piece.master.copy_(flat.narrow(0, piece.start, piece.master.numel()))
