"""Losses of decayed checkpoints over size and tokens, by held-out set: what a scaling law is fitted to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.economics import training_flops
from minicpm_megatron.methods.scaling_law import Array, Points

MEAN = "mean of the sets"
BILLION = 1e9  # the laws' unit of N and of D


@dataclass(frozen=True)
class Measurement:
    """One decayed checkpoint on one held-out set.

    Attributes:
        parameters: N, without embeddings.
        tokens: D.
        loss: in any unit; the paper's is nats per byte.
    """

    parameters: float
    tokens: float
    loss: float


Sets = Mapping[str, Sequence[Measurement]]
"""Name of a held-out set -> what was measured on it."""


@dataclass(frozen=True)
class LossSet:
    """One held-out set in the units of `methods.scaling_law`.

    Attributes:
        name: of the set.
        n, d: [points], in 1e9.
        loss: [points].
    """

    name: str
    n: Array
    d: Array
    loss: Array

    @classmethod
    def of(cls, name: str, measurements: Sequence[Measurement]) -> LossSet:
        """Raises UserError: too few points, sizes or amounts of tokens, or values that are not positive and finite."""
        columns = np.array([(each.parameters, each.tokens, each.loss) for each in measurements], dtype=np.float64)
        n, d, loss = columns.reshape(-1, 3).T
        Points.of(n / BILLION, d / BILLION, loss)
        return cls(name, n / BILLION, d / BILLION, loss)

    @property
    def sizes(self) -> list[float]:
        """N of the models in 1e9, rising."""
        return sorted({float(each) for each in self.n})

    @property
    def largest_compute(self) -> float:
        """FLOPs, 6 N D, of the dearest point."""
        return max(training_flops(n * BILLION, d * BILLION) for n, d in zip(self.n, self.d, strict=True))


def mean_over_sets(sets: Sets) -> list[Measurement]:
    """The mean loss over the sets of every checkpoint, which the paper's last row is fitted to.

    What one set has several times (seeds) is averaged in the set first.

    Raises:
        UserError: the sets were not measured on the same checkpoints.

    >>> one, two = Measurement(1e6, 1e7, 3.0), Measurement(1e6, 1e7, 4.0)
    >>> mean_over_sets({"a": [one], "b": [two]})
    [Measurement(parameters=1000000.0, tokens=10000000.0, loss=3.5)]
    """
    by_set = {name: _by_checkpoint(measurements) for name, measurements in sets.items()}
    first_name, first = next(iter(by_set.items()))
    for name, checkpoints in by_set.items():
        odd = sorted(set(checkpoints) ^ set(first))
        if odd:
            lacks = name if odd[0] in first else first_name
            raise UserError(
                f"set {lacks} lacks n = {odd[0][0]:.12g}, d = {odd[0][1]:.12g}, so that there is no mean over the sets",
                fix="give every set the same points, or fit the sets apart",
            )
    return [
        Measurement(*checkpoint, math.fsum(each[checkpoint] for each in by_set.values()) / len(by_set))
        for checkpoint in first
    ]


def _by_checkpoint(measurements: Sequence[Measurement]) -> dict[tuple[float, float], float]:
    found: dict[tuple[float, float], list[float]] = {}
    for each in measurements:
        found.setdefault((each.parameters, each.tokens), []).append(each.loss)
    return {checkpoint: math.fsum(losses) / len(losses) for checkpoint, losses in found.items()}
