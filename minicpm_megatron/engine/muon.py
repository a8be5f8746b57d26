"""Muon as a torch optimizer: hidden matrices step by their orthogonalised momentum, all else by torch's AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from minicpm_megatron.errors import require

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Coefficients a, b, c of Jordan et al. 2024. Five iterations map singular values between 0.003 and 1 to values between
0.68 and 1.21; more iterations bring them no closer to 1."""


class Matrices(Protocol):
    """What brings whole matrices together; `engine.whole_matrices.WholeMatrices` is one.

    Attributes:
        dtype: in which products of them may be made.
    """

    dtype: torch.dtype

    def transform(self, updates: Mapping[Tensor, Tensor], function: Callable[[str, Tensor], Tensor]) -> None:
        """Replace the matrices that `updates` hold parts of by what `function` makes of each whole one.

        Args:
            updates: tensor that the optimizer steps -> flat fp32 update of it, changed in place.
            function: (name, whole matrix [rows, columns]) -> the same shape.
        """


class OwnMatrices:
    """Every tensor that is stepped is a whole matrix: one process without ZeRO, and no fused weights."""

    dtype = torch.float32

    def transform(self, updates: Mapping[Tensor, Tensor], function: Callable[[str, Tensor], Tensor]) -> None:
        """As `Matrices.transform`."""
        for number, (parameter, update) in enumerate(updates.items()):
            if parameter.dim() != 2:
                raise RuntimeError(
                    f"a tensor of {parameter.dim()} dimensions is no matrix: set `matrices` before stepping"
                )
            update.copy_(function(str(number), update.view_as(parameter)).reshape(-1))


def newton_schulz(matrix: Tensor, steps: int) -> Tensor:
    """Return a matrix with the singular vectors of `matrix` and singular values near 1, about U V^T.

    The iteration X <- a X + (b A + c A^2) X with A = X X^T applies an odd polynomial to the singular values
    (Jordan et al. 2024; Bernstein and Newhouse, arXiv 2409.20325). It runs in the matrix's own dtype.

    Args:
        matrix: [rows, columns].
    """
    a, b, c = COEFFICIENTS
    wide = matrix.mT if matrix.size(0) > matrix.size(1) else matrix  # the smaller of the two Gram matrices
    # by the largest element first: squares of elements below 1e-19 are no fp32 numbers any more
    x = wide / wide.abs().amax().clamp_min(torch.finfo(wide.dtype).tiny)
    # the Frobenius norm bounds the spectral one; below 1 it is that of a matrix of zeros, or nearly so
    x = x / x.norm(dtype=torch.float32).clamp_min(1.0).to(wide.dtype)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if matrix.size(0) > matrix.size(1) else x


class Muon(torch.optim.Optimizer):
    """Muon for the groups called as one of `roles`, AdamW for all others.

    Of a matrix W of shape [fan_out, fan_in] with gradient G:

        M <- momentum M + (1 - momentum) G,  N = momentum M + (1 - momentum) G (Nesterov), otherwise M
        W <- W - lr weight_decay W - lr update_rms update_norm sqrt(fan_out / fan_in) newton_schulz(N)

    A missing gradient counts as zero: every rank must take part in every exchange. `step` overwrites the gradients of
    Muon's groups. The size of an update does not depend on that of its gradients, so that a matrix whose gradients are
    all zero, an expert without tokens, goes on in its last direction.

    Args:
        groups: those of `mup_param_groups`; Muon's have an `update_norm`.
        roles: names of Muon's groups.
        lr, betas, eps: AdamW's; groups have a learning rate of their own.
        momentum, nesterov, ns_steps, update_rms: as in `optimizers.muon.MuonOptions`.

    Attributes:
        matrices: what brings whole matrices together, and says in which dtype Newton-Schulz runs.

    Raises:
        UserError: a group of Muon's has no `update_norm`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        roles: Collection[str],
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        update_rms: float,
    ) -> None:
        for group in groups:
            require(
                group["name"] not in roles or group.get("update_norm") is not None,
                "optimizer",
                f"group {group['name']!r} has no update_norm",
                "build the groups with mup_param_groups and muon's lr_rules",
            )
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.roles, self.momentum, self.nesterov = frozenset(roles), momentum, nesterov
        self.ns_steps, self.update_rms = ns_steps, update_rms
        self.matrices: Matrices = OwnMatrices()
        self._adamw = torch.optim.AdamW(self.param_groups, lr=lr, betas=betas, eps=eps, fused=True)

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:  # torch's overloads return a float with a closure, which is ignored
        """Step every group that has parameters."""
        self._adamw.state = self.state  # one state for both, under the tensors that both step
        # DeepSpeed hides groups and replaces parameters between steps, so that both halves are found anew
        self._adamw.param_groups = [group for group in self.param_groups if group["name"] not in self.roles]
        self._adamw.step()
        groups = [group for group in self.param_groups if group["name"] in self.roles]
        updates = {parameter: self._momentum(parameter) for group in groups for parameter in group["params"]}
        if updates:
            self.matrices.transform(updates, self._orthogonal)
        for group in groups:
            scale = group["lr"] * self.update_rms * group["update_norm"]
            for parameter in group["params"]:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(updates[parameter].view_as(parameter), alpha=-scale)

    def _momentum(self, parameter: Tensor) -> Tensor:
        """Add the gradient to the momentum and return what is to be orthogonalised, flat and fp32."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["momentum_buffer"] = torch.zeros_like(parameter, dtype=torch.float32)
        state["step"] += 1
        buffer: Tensor = state["momentum_buffer"]
        if parameter.grad is None:
            buffer.mul_(self.momentum)
            return (buffer * (self.momentum if self.nesterov else 1.0)).reshape(-1)
        gradient = parameter.grad.detach().to(buffer.dtype)
        buffer.lerp_(gradient, 1 - self.momentum)
        # the gradient has done its work: its memory takes the update, so that none is allocated
        update = gradient.lerp_(buffer, self.momentum) if self.nesterov else gradient.copy_(buffer)
        return update.reshape(-1)

    def _orthogonal(self, name: str, matrix: Tensor) -> Tensor:
        orthogonal = newton_schulz(matrix.to(self.matrices.dtype), self.ns_steps).to(matrix.dtype)
        return orthogonal * math.sqrt(matrix.size(0) / matrix.size(1))
