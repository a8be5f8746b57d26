"""Both fits of the scaling law to every held-out set and to the mean of the sets, with what they are worth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import get_args

import numpy as np

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.intervals import Interval
from minicpm_megatron.methods.scaling_law import PARAMETERS, Array, Method, ScalingLaw, fit_scaling_law
from minicpm_megatron.methods.scaling_law_bootstrap import BootstrappedLaw, bootstrap
from minicpm_megatron.windtunnel.law.losses import MEAN, LossSet, Sets, mean_over_sets

METHODS: tuple[Method, ...] = get_args(Method)
LEAST_DOF = 3
"""Points above the coefficients below which no limits are given: ours, since fits of fewer leave next to no residuals
to draw from."""


@dataclass(frozen=True)
class Fit:
    """One fit of one set.

    Attributes:
        law: the best fit.
        bootstrapped: None where the points are too few for limits.
        residuals: [points], measured less fitted loss.
    """

    law: ScalingLaw
    bootstrapped: BootstrappedLaw | None
    residuals: Array

    @property
    def error(self) -> float:
        """Root mean square of the residuals, in the unit of the loss."""
        return float(np.sqrt(np.mean(self.residuals**2)))

    def interval(self, of: Callable[[ScalingLaw], float]) -> Interval | None:
        """95 % limits of what follows from the law; None where they are not known."""
        return None if self.bootstrapped is None else self.bootstrapped.interval(of)


@dataclass(frozen=True)
class SetFits:
    """A held-out set, or the mean of the sets, with each method's fit."""

    losses: LossSet
    fits: Mapping[Method, Fit]


def fit_sets(sets: Sets) -> list[SetFits]:
    """The fits of every set, and last, where there are several, of their mean.

    Raises:
        UserError: too few points, sets of different checkpoints, or a fit that does not converge.
    """
    if not sets:
        raise UserError("no losses were measured")
    found = [LossSet.of(name, measurements) for name, measurements in sets.items()]
    if len(sets) > 1:
        found.append(LossSet.of(MEAN, mean_over_sets(sets)))
    return [_fit(losses) for losses in found]


def _fit(losses: LossSet) -> SetFits:
    try:
        return SetFits(losses, {method: _fit_by(losses, method) for method in METHODS})
    except UserError as error:
        raise UserError(f"set {losses.name}: {error.what}", where=error.where, fix=error.fix) from None


def _fit_by(losses: LossSet, method: Method) -> Fit:
    n, d, loss = losses.n, losses.d, losses.loss
    bootstrapped = None
    if len(loss) - PARAMETERS >= LEAST_DOF:
        bootstrapped = bootstrap(n, d, loss, method=method)
    law = fit_scaling_law(n, d, loss, method) if bootstrapped is None else bootstrapped.law
    return Fit(law, bootstrapped, loss - law.loss(n, d))
