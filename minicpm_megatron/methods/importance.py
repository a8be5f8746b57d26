"""How much of a loss each of several settings decides, from losses at points that need not be a grid.

The loss is fitted by least squares with a sum of parabolas, one a setting, over a box. In the orthonormal polynomials
of the box (Legendre's) the variance of such a surface is a sum of squares, and the share of a setting in it is its
first-order Sobol' index (Sobol' 2001; from polynomial chaos: Sudret 2008). Parabolas are what the paper fits, too,
where it looks for an optimum (section 3.2); interactions between settings are left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from minicpm_megatron.errors import require

TERMS = 2  # of each setting: P1 and P2
_SPARE = 2  # points beyond the coefficients, below which leaving one out tells nothing


@dataclass(frozen=True)
class Importances:
    """What the surface says.

    Attributes:
        shares: [settings], of the variance over the box; 1 in all.
        predicted: Q^2, the share of the losses' variance that the surface predicts for each point from all others; at
            most 1, below 0 worse than their mean. It says whether the shares are to be believed.
    """

    shares: NDArray[np.float64]
    predicted: float


def importances(points: ArrayLike, losses: ArrayLike) -> Importances:
    """The share of each setting in the variance of the losses over a box.

    Args:
        points: [points, settings], each setting from -1 to 1 over its range (of logarithms, where those matter).
        losses: [points], finite.

    Raises:
        UserError: too few points for the surface, points that do not determine it, losses that are all the same, or
            anything that is not finite.

    >>> chance = np.random.default_rng(0)
    >>> u = chance.uniform(-1, 1, (40, 2))
    >>> np.round(importances(u, 4 + u[:, 0] + 3 * u[:, 1] ** 2).shares, 3)  # 1/3 and 9 x 4/45
    array([0.294, 0.706])
    """
    u, y = np.asarray(points, dtype=np.float64), np.asarray(losses, dtype=np.float64)
    require(u.ndim == 2 and y.shape == u.shape[:1], "importances", "not one loss for every point")
    require(bool(np.isfinite(u).all() and np.isfinite(y).all()), "importances", "not all numbers are finite")
    settings = u.shape[1]
    least = 1 + TERMS * settings + _SPARE
    require(len(y) >= least, "importances", f"{len(y)} losses, and {settings} settings need {least}")
    first, second = np.sqrt(3) * u, np.sqrt(5) * (3 * u**2 - 1) / 2
    surface = np.concatenate([np.ones((len(y), 1)), first, second], axis=1)
    inverse = np.linalg.pinv(surface)
    # a point whose hat value is 1 is met by the surface whatever its loss: nothing is left out there
    left_out = 1 - np.einsum("ij,ji->i", surface, inverse)
    determined = np.linalg.matrix_rank(surface) == surface.shape[1] and left_out.min() > 1e-9
    require(bool(determined), "importances", "the points do not determine a parabola of each setting")
    coefficients = inverse @ y
    variances = coefficients[1 : 1 + settings] ** 2 + coefficients[1 + settings :] ** 2
    require(float(np.ptp(y)) > 0 and variances.sum() > 0, "importances", "all losses are the same")
    errors = (y - surface @ coefficients) / left_out
    return Importances(variances / variances.sum(), float(1 - (errors**2).mean() / y.var()))
