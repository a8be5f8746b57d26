"""What gradients say about the decay stage: section 4.4 of arXiv 2404.06395.

Of the flattened gradients g(t), g(t+1) and the update v(t) = x(t+1) - x(t), everything follows from six dot products.
They are sums over elements, so each rank adds up those of its own shard and only six numbers are summed over ranks: no
gradient is gathered under tensor or pipeline parallelism or ZeRO. Each element must be counted once: a parameter that
several ranks hold whole (norms under tensor parallelism, tied embeddings) counts on one of them. g(t) and g(t+1) are
gradients before clipping, of the same loss scale.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from minicpm_megatron.errors import UserError

CHUNK = 1 << 20  # elements that are held in fp64 at once


@dataclass(frozen=True)
class DecaySums:
    """Dot products of a part of the model; parts add up with `+` and `sum(parts, DecaySums())`.

    Attributes:
        gg, hh, vv: squared norms of g = g(t), h = g(t+1), v = v(t).
        gh, gv, hv: their products.
    """

    gg: float = 0.0
    gh: float = 0.0
    hh: float = 0.0
    gv: float = 0.0
    hv: float = 0.0
    vv: float = 0.0

    def __add__(self, other: DecaySums) -> DecaySums:
        return DecaySums(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def to_tensor(self, device: torch.device | str = "cpu") -> Tensor:
        """[6] in fp64: what ranks add up with an all-reduce."""
        return torch.tensor(astuple(self), dtype=torch.float64, device=device)

    @classmethod
    def from_tensor(cls, values: Tensor) -> DecaySums:
        """What `to_tensor` made, after the all-reduce."""
        return cls(*values.tolist())

    @property
    def gradient_norm(self) -> float:
        """|g(t)|."""
        return math.sqrt(self.gg)

    @property
    def gradient_cosine(self) -> float:
        """g(t) . g(t+1) / (|g(t)| |g(t+1)|); nan where one of them is zero."""
        return _ratio(self.gh, math.sqrt(self.gg) * math.sqrt(self.hh))

    @property
    def update_norm(self) -> float:
        """|v(t)|."""
        return math.sqrt(self.vv)

    @property
    def first_derivative(self) -> float:
        """D1 = g(t+1) . v(t) / |v(t)|: slope of the loss along the update, at its end; nan without an update."""
        return _ratio(self.hv, math.sqrt(self.vv))

    @property
    def second_derivative(self) -> float:
        """D2 = (g(t+1) - g(t)) . v(t) / |v(t)|^2, for a quadratic loss v . H v / |v|^2; nan without an update."""
        return _ratio(self.hv - self.gv, self.vv)

    @property
    def curvature(self) -> float:
        """K = |D2| / (1 + D1^2)^(3/2), of the loss as a curve over the way that was gone; nan without an update."""
        return float(abs(self.second_derivative) / (1 + self.first_derivative**2) ** 1.5)


def decay_sums(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> DecaySums:
    """The sums of some tensors or shards.

    Args:
        triples: (g(t), g(t+1), v(t)) of each, equal shapes, any floating type; products and sums are in fp64.

    Raises:
        UserError: shapes that differ.

    >>> g, v = torch.tensor([3.0, 4.0]), torch.tensor([-0.3, -0.4])
    >>> sums = decay_sums([(g, 0.5 * g, v)])
    >>> sums.gradient_norm, sums.gradient_cosine, round(sums.first_derivative, 6), round(sums.second_derivative, 5)
    (5.0, 1.0, -2.5, 5.0)
    """
    total: Tensor | None = None
    for tensors in triples:
        if len({tensor.shape for tensor in tensors}) != 1:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in tensors)
            raise UserError(f"shapes {shapes} of gradients and update", where="decay_sums")
        for parts in zip(*(tensor.detach().reshape(-1).split(CHUNK) for tensor in tensors), strict=True):
            g, h, v = (part.double() for part in parts)
            sums = torch.stack([g @ g, g @ h, h @ h, g @ v, h @ v, v @ v])
            total = sums if total is None else total + sums.to(total.device)
    return DecaySums() if total is None else DecaySums.from_tensor(total)


def largest_update(before: Tensor, after: Tensor) -> float:
    """max_ij |W(t+1)_ij - W(t)_ij| of one matrix (figure 7), in fp64; that of a whole is the largest of its shards.

    Raises:
        UserError: shapes that differ.

    >>> largest_update(torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 1.0]]))
    1.0
    """
    if before.shape != after.shape:
        raise UserError(f"shapes {tuple(before.shape)} and {tuple(after.shape)}", where="largest_update")
    pairs = zip(before.detach().reshape(-1).split(CHUNK), after.detach().reshape(-1).split(CHUNK), strict=True)
    return max((float((b.double() - a.double()).abs().max()) for a, b in pairs if len(a)), default=0.0)


def _ratio(above: float, below: float) -> float:
    return above / below if below else math.nan
