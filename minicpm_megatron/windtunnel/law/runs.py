"""The scaling law from one stable run a size: section 4.5, figures 9, 10 and 17.

Of every size one trunk at the full rate; from it a decay at each of k amounts of tokens, so that m sizes with k points
each cost m trunks and m k short decays instead of m k runs. Lengths are in tokens a parameter, so that all sizes are
trained in proportion; decays are a share of the tokens at their end.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minicpm_megatron.errors import require
from minicpm_megatron.methods.scaling_law import PARAMETERS, Method
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.branching import (
    Series,
    Timeline,
    format_savings,
    make_series,
    shared_costs,
)
from minicpm_megatron.windtunnel.cells import Cell, size_name
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.law.runs_findings import evaluate_scaling
from minicpm_megatron.windtunnel.settings import check_different, check_range, check_share

KIND = "scaling-law"
POINTS, TOKENS_PER_PARAMETER = 6, (10.0, 60.0)  # section 4.5: 10 N to 60 N
LEAST_SIZES = 3  # what tells an exponent from L0


@dataclass(frozen=True)
class ScalingSettings:
    """What is asked for.

    Attributes:
        sizes: (width, layers) of each model.
        points: decays of each size, evenly spaced in tokens.
        tokens_per_parameter: D / N of the first and of the last of them; N without embeddings.
        decay_share: of the tokens at its end that a decay is.
        shape: of the decays.
        method: the fit that findings and pictures speak of.
        compute: FLOPs of the compute-optimal model.
    """

    sizes: tuple[tuple[int, int], ...]
    points: int
    tokens_per_parameter: tuple[float, ...]
    decay_share: float
    shape: str
    method: Method
    compute: float

    def __post_init__(self) -> None:
        check_different("--sizes", self.sizes, "sizes", LEAST_SIZES)
        enough = self.points >= 2 and self.points * len(self.sizes) > PARAMETERS
        told = f"{self.points} of {len(self.sizes)} sizes are too few points for {PARAMETERS} coefficients"
        require(enough, "--points", told)
        check_range("--tokens-per-parameter", self.tokens_per_parameter)
        check_share("--decay-share", self.decay_share)

    def lengths(self) -> list[float]:
        """D / N of every decay's end, rising."""
        low, high = self.tokens_per_parameter
        return [float(each) for each in np.linspace(low, high, self.points)]


def plan_scaling(base: Recipe, settings: ScalingSettings, output: Path) -> Experiment:
    """A trunk and its decays of every size.

    Raises:
        UserError: a size that does not divide into heads, points that are the same step, a decay that begins in the
            warmup, an unknown shape, or a batch that grows.
    """
    timeline = Timeline(base)
    cells = [cell for size in settings.sizes for cell in _of_size(timeline, output, settings, size)]
    names = ", ".join(size_name(*size) for size in settings.sizes)
    title = f"Scaling law of {names} with {settings.points} decays each (section 4.5 of arXiv 2404.06395)"
    notes = (format_savings(shared_costs(cells)),)
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_scaling, notes)


def _of_size(timeline: Timeline, output: Path, settings: ScalingSettings, size: tuple[int, int]) -> list[Cell]:
    series = Series(size, tuple(settings.lengths()), settings.decay_share, settings.shape)
    return make_series(timeline, output, series)
