"""Tokens a parameter deserves, from the loss curves of a family of sizes: the estimate of section 4.5 for Llama 2.

A curve under a cosine schedule sags in its middle, where the learning rate is still high: it is concave there. Section
4.5 fills that part with a straight line, as if WSD had been used and a decay had left at every point. Here a curve's
lower convex hull in log loss over log compute does that. Where the filled curve of one size meets that of the next
larger one, the larger takes over; the smaller one has deserved so many tokens a parameter. A straight line lies above
the curve that WSD would have had, so crossings inside a filled part come too early.

Units: N parameters and D tokens are plain counts, compute is 6 N D in FLOPs; the loss may be in any unit, the same for
all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.methods.economics import training_flops
from minicpm_megatron.methods.loss_envelope import convex_points

Array = NDArray[np.float64]
Curve = tuple[Sequence[float], Sequence[float]]
"""Tokens and losses of one run, [points] each."""

PUBLISHED = (70.0, 100.0)
"""Tokens a parameter, section 4.5: 34B meets 70B at 5e23 FLOPs, 13B meets 34B at 1e23."""


@dataclass(frozen=True)
class Crossing:
    """Where the curve of a size meets that of the next larger one.

    Attributes:
        smaller, larger: N of the two.
        compute: FLOPs at which both have the same loss.
        loss: there.
    """

    smaller: float
    larger: float
    compute: float
    loss: float

    @property
    def tokens_per_parameter(self) -> float:
        """D / N of the smaller one there: compute / (6 N^2).

        >>> [round(Crossing(n, 70e9, compute, 1.6).tokens_per_parameter) for n, compute in ((34e9, 5e23), (13e9, 1e23))]
        [72, 99]
        """
        return self.compute / training_flops(self.smaller, self.smaller)


@dataclass(frozen=True)
class FilledCurve:
    """A curve whose concave parts are filled.

    Attributes:
        compute: FLOPs, [points], rising.
        loss: [points], falling; a straight line in log-log from each to the next.
    """

    compute: Array
    loss: Array

    @classmethod
    def of(cls, parameters: float, curve: Curve) -> FilledCurve:
        """Fill the curve of a model with so many parameters.

        Raises:
            UserError: lengths that differ, values that are not positive and finite, or no two points of a falling loss.
        """
        tokens, loss = (np.asarray(column, dtype=np.float64) for column in curve)
        compute = training_flops(parameters, 1.0) * tokens
        hull = convex_points(compute, loss)
        require(
            len(hull) > 1, f"{parameters:.12g} parameters", "the losses are no curve that falls", "give more points"
        )
        return cls(compute[hull], loss[hull])

    def log_loss(self, log_compute: Array) -> Array:
        """Log of the filled loss at logs of compute within the curve."""
        return np.interp(log_compute, np.log(self.compute), np.log(self.loss))


def crossings(curves: Mapping[float, Curve]) -> list[Crossing]:
    """Where the filled curve of each size meets that of the next larger one, by rising size.

    A pair that does not cross within the compute that both were trained with is left out. Where noise makes two curves
    cross several times, the last one counts: from there on the larger stays ahead.

    Args:
        curves: N -> tokens and losses.

    Raises:
        UserError: fewer than two sizes, or as `FilledCurve.of`.

    >>> tokens = np.geomspace(1e7, 1e12, 200)
    >>> curves = {n: (tokens, 100 * n**-0.3 + 100 * tokens**-0.3) for n in (1e8, 4e8)}
    >>> [round(each.tokens_per_parameter, 2) for each in crossings(curves)]
    [4.0]
    """
    if len(curves) < 2:
        raise UserError(f"{len(curves)} sizes have no next larger one", where="curves", fix="give two or more")
    require(min(curves) > 0, "curves", f"{min(curves):g} is no number of parameters")
    filled = {n: FilledCurve.of(n, curves[n]) for n in sorted(curves)}
    sizes = list(filled)
    found = (_cross(small, filled[small], large, filled[large]) for small, large in zip(sizes, sizes[1:], strict=False))
    return [each for each in found if each is not None]


def _cross(small: float, first: FilledCurve, large: float, second: FilledCurve) -> Crossing | None:
    """The last change from "the smaller has less loss" to "the larger has less"."""
    logs = np.log(np.union1d(first.compute, second.compute))
    low, high = (math.log(pick(first.compute[end], second.compute[end])) for pick, end in ((max, 0), (min, -1)))
    logs = logs[(logs >= low) & (logs <= high)]
    ahead = second.log_loss(logs) - first.log_loss(logs)  # above 0 while the smaller one has less loss
    turns = np.flatnonzero((ahead[:-1] > 0) & (ahead[1:] <= 0))
    if not len(turns) or ahead[-1] > 0:
        return None
    # both are straight between the points of either, so their difference is, too
    at = int(turns[-1])
    share = ahead[at] / (ahead[at] - ahead[at + 1])
    place = logs[at] + share * (logs[at + 1] - logs[at])
    return Crossing(small, large, math.exp(place), math.exp(float(first.log_loss(np.array(place)))))
