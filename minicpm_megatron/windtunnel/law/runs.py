"""The scaling law from one stable run a size: section 4.5, figures 9, 10 and 17.

Of every size one trunk at the full rate; from it a decay at each of k amounts of tokens, so that m sizes with k points
each cost m trunks and m k short decays instead of m k runs. Lengths are in tokens a parameter, so that all sizes are
trained in proportion; decays are a share of the tokens at their end.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minicpm_megatron.errors import require
from minicpm_megatron.methods.scaling_law import PARAMETERS, Method
from minicpm_megatron.recipe import Recipe, count_parameters
from minicpm_megatron.windtunnel.branching import SharedCosts, Timeline, make_branch, make_trunk, shared_costs
from minicpm_megatron.windtunnel.cells import Cell, make_cell, model_of_size
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.law.runs_findings import evaluate_scaling

KIND = "scaling-law"
POINTS, TOKENS_PER_PARAMETER = 6, (10.0, 60.0)  # section 4.5: 10 N to 60 N
DECAY_SHARE = 0.1  # section 4.3
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
        different = len(set(self.sizes)) == len(self.sizes) >= LEAST_SIZES
        require(different, "--sizes", f"not a list of at least {LEAST_SIZES} different sizes")
        enough = self.points >= 2 and self.points * len(self.sizes) > PARAMETERS
        told = f"{self.points} of {len(self.sizes)} sizes are too few points for {PARAMETERS} coefficients"
        require(enough, "--points", told)
        given = self.tokens_per_parameter
        rising = len(given) == 2 and 0 < given[0] < given[1] < math.inf
        require(rising, "--tokens-per-parameter", "not two positive numbers of which the second is larger")
        require(0 < self.decay_share < 1, "--decay-share", f"{self.decay_share:g} is no share between 0 and 1")

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
    names = ", ".join(_name(size) for size in settings.sizes)
    title = f"Scaling law of {names} with {settings.points} decays each (section 4.5 of arXiv 2404.06395)"
    notes = (_savings(shared_costs(cells)),)
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_scaling, notes)


def _of_size(timeline: Timeline, output: Path, settings: ScalingSettings, size: tuple[int, int]) -> list[Cell]:
    width, layers = size
    model = model_of_size(timeline.base, width, layers)
    parameters = count_parameters(make_cell(timeline.base, output, _name(size), model, {}).recipe.model).non_embedding
    ends = [round(length * parameters / timeline.tokens_per_step) for length in settings.lengths()]
    leaves = [end - timeline.decay(end, settings.decay_share) for end in ends]
    fix = "raise --tokens-per-parameter, or make the batch or the warmup smaller"
    what = f"points of {_name(size)} (N = {parameters:,}) end at steps {', '.join(map(str, ends))}"
    require(len(set(ends)) == len(ends), "--points", f"{what}, not all different", fix)
    warmup = f"{what}, and the first decay begins in the {timeline.warmup_steps} steps of warmup"
    require(leaves[0] >= max(1, timeline.warmup_steps), "--tokens-per-parameter", warmup, fix)
    labels = {"width": width, "layers": layers}
    overrides = model | {"evaluation.interval": leaves[-1]}
    trunk = make_trunk(timeline, output, f"trunk-{_name(size)}", leaves, overrides, {"role": "trunk", **labels})
    cells = [trunk]
    for length, end in zip(settings.lengths(), ends, strict=True):
        overrides = model | {"evaluation.interval": end}
        more = {
            "role": "decayed",
            **labels,
            "tokens_per_parameter": length,
            "end_tokens": end * timeline.tokens_per_step,
        }
        name = f"{_name(size)}-{length:.4g}N"
        share, shape = settings.decay_share, settings.shape
        cells.append(make_branch(timeline, output, name, trunk, end, share, shape, overrides, more))
    return cells


def _savings(costs: SharedCosts) -> str:
    return (
        f"trunks and decays: {costs.tokens:,} tokens, {costs.flops:.3g} FLOPs; as separate runs:"
        f" {costs.separate_tokens:,} tokens, {costs.separate_flops:.3g} FLOPs;"
        f" {costs.flops / costs.separate_flops:.0%} of the FLOPs"
    )


def _name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
