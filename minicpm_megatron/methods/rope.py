"""Rotary positions for contexts longer than a model was trained on: which base the angles are computed with.

RoPE (Su et al. 2021, arXiv 2104.09864) turns channel pair i of d by position x base^(-2i/d). Everything here changes
the base and nothing else, so that a scaled model is an ordinary one with another base at each length:

- adjusted base frequency (ABF; Xiong et al. 2023, arXiv 2309.16039): simply another `rotary_base`, with which section
  7.2 of arXiv 2404.06395 goes from 4K to 32K;
- `ntk`, `product`, `dynamic`: below. Section 7.2 goes on to 128K with the first; its released configuration has the
  last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


def ntk_base(base: float, factor: float, channels: int) -> float:
    """base x s^(d / (d - 2)): the slowest pair turns s times as slowly, the fastest as before.

    NTK-aware interpolation (bloc97 2023; appendix A.2 of YaRN, arXiv 2309.00071).

    >>> round(ntk_base(10_000.0, 4.0, 64), 2)
    41829.37
    >>> slowest = lambda base: base ** (-62 / 64)
    >>> round(slowest(10_000.0) / slowest(ntk_base(10_000.0, 4.0, 64)), 12)
    4.0
    """
    return float(base * factor ** (channels / (channels - 2)))


def product_base(base: float, factor: float, channels: int) -> float:
    """base x s x d / (d - 2): the exponent of `ntk_base` taken for a factor.

    The form that users of the published 128K model run at its factor 4; 1.3 % below `ntk_base` there.

    >>> round(product_base(1e6, 4.0, 64), 2)
    4129032.26
    """
    return base * factor * (channels / (channels - 2))


def dynamic_base(base: float, factor: float, channels: int, length: int, original: int) -> float:
    """base x (s n / N - (s - 1))^(d / (d - 2)) for sequences of n > N tokens, the plain base for shorter ones.

    Dynamic NTK (emozilla 2023), as transformers' `dynamic` computes it; continuous at n = N.

    Args:
        length: n, tokens of the sequence; every position of it turns by the same base.
        original: N, tokens up to which nothing is scaled.

    >>> dynamic_base(1e6, 4.0, 64, 65_536, original=65_536)
    1000000.0
    >>> round(dynamic_base(1e6, 4.0, 64, 131_072, original=65_536), 1)
    5266443.4
    """
    if length <= original:
        return base
    return ntk_base(base, factor * length / original - (factor - 1), channels)


@dataclass(frozen=True)
class Rope:
    """How a model turns its queries and keys.

    Attributes:
        channels: d, of one head.
        base: before scaling.
        kind: none, dynamic, ntk or product.
        factor: s; without meaning for none.
        original: N of `dynamic_base`; without meaning for the others.
    """

    channels: int
    base: float
    kind: str = "none"
    factor: float = 1.0
    original: int = 0

    def base_at(self, length: int) -> float:
        """The base for a sequence of `length` tokens; only dynamic scaling asks for the length.

        >>> Rope(64, 1e6, "dynamic", 4.0, original=65_536).base_at(4096)
        1000000.0
        """
        if self.kind == "dynamic":
            return dynamic_base(self.base, self.factor, self.channels, length, self.original)
        if self.kind == "none":
            return self.base
        return {"ntk": ntk_base, "product": product_base}[self.kind](self.base, self.factor, self.channels)


class _Scaling(Protocol):
    @property
    def type(self) -> str: ...
    @property
    def factor(self) -> float | None: ...


class RopeShape(Protocol):
    """What `rope_of` asks of a model: a `ModelRecipe`, a `MiniCPMConfig` or anything alike."""

    @property
    def kv_channels(self) -> int | None: ...
    @property
    def rotary_base(self) -> float: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def rope_scaling(self) -> _Scaling: ...


def rope_of(model: RopeShape) -> Rope:
    """The rotary positions of a model."""
    scaling = model.rope_scaling
    assert model.kv_channels is not None
    # dynamic scaling begins where transformers lets it begin
    return Rope(
        model.kv_channels, model.rotary_base, scaling.type, scaling.factor or 1.0, model.max_position_embeddings
    )
