"""ZeRO 1 to 3: every data-parallel rank keeps masters and moments of its partition of the parameters."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor

from minicpm_megatron.engine.zero.adapter import Adapter, Update


class Partitioned(Adapter):
    """DeepSpeed measures and clips gradients, and skips an update whose norm is not finite."""

    def gradient_norm(self) -> float:
        """As `Adapter.gradient_norm`."""
        value = float(self._norm())  # compared on the host: on CUDA every look at the tensor waits for the device
        # one of DeepSpeed's functions returns -1 for a norm that is not finite
        return value if value >= 0 else math.inf

    def discard(self) -> None:
        """As `Adapter.discard`: DeepSpeed drops gradients that are not finite, with all that it keeps beside them."""
        self._spoil()
        self._update()
        self._forget_skipped()

    def step(self) -> Update:
        """As `Adapter.step`."""
        skipped = self.engine.skipped_steps
        self._update()
        applied = self.engine.skipped_steps == skipped
        if not applied:
            self._forget_skipped()
        norm = self.engine.get_global_grad_norm()
        value = float("nan") if norm is None else float(norm)
        return Update(value, applied and math.isfinite(value))

    @abstractmethod
    def _norm(self) -> Any:
        """Return the norm, a number or a tensor; negative or nan where it is not finite."""

    @abstractmethod
    def _gradients(self) -> list[Tensor]:
        """Return this rank's accumulated gradients at the end of a step's last micro-batch."""

    def _spoil(self) -> None:
        """Make gradients infinite."""
        for gradient in self._gradients():
            gradient.fill_(math.inf)

    def _forget_skipped(self) -> None:
        """Called when DeepSpeed has skipped an update: drop what it would add to the next step."""
        return


class Offloaded(Partitioned):
    """Mixin of the adapters whose gradients, masters and moments are in the host's memory."""

    def _spoil(self) -> None:
        norms = self.optimizer.norm_for_param_grads  # DeepSpeed knows gradients on the host by their norms
        norms.update(dict.fromkeys(norms, torch.tensor(math.inf)))
