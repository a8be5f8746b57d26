"""Continued training of one size: section 4.3, figure 6 and appendix B.2.

A trunk of the small size at the full rate, and a decay that leaves it at each of several amounts of tokens, up to far
beyond what its size deserves: the decayed losses are the envelope. Of the large size, where there is one, a trunk and
its decays at fewer tokens a parameter; the paper's is trained on 40 N. Each seed has trunks and decays of its own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from minicpm_megatron.errors import require
from minicpm_megatron.methods.loss_envelope import PARAMETERS
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.branching import (
    Series,
    Timeline,
    format_savings,
    make_series,
    shared_costs,
)
from minicpm_megatron.windtunnel.cells import Cell, size_name
from minicpm_megatron.windtunnel.envelope.findings import evaluate_envelope
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.settings import are_different_and_positive, check_different, check_range, check_share

KIND = "envelope"
TOKENS_PER_PARAMETER, POINTS = (10.0, 320.0), 8  # ours: the paper gives no numbers, its figure 6 is a picture
LARGE_TOKENS_PER_PARAMETER = 40.0  # section 4.3: WSD(40N, 4N)
LEAST_POINTS = PARAMETERS + 3  # what the criterion that chooses between the forms needs
_TRUNK_EVALUATIONS = 40


@dataclass(frozen=True)
class EnvelopeSettings:
    """What is asked for.

    Attributes:
        sizes: (width, layers) of the small model, and of the large one where there is one.
        points: decays of the small one, evenly spaced in log tokens.
        tokens_per_parameter: D / N of the first and the last of them.
        large_tokens_per_parameter: D / N of the decays of the large one.
        decay_share: of the tokens at its end that a decay is.
        shape: of the decays.
        seeds: each decides initial weights and sample order.
    """

    sizes: tuple[tuple[int, int], ...]
    points: int
    tokens_per_parameter: tuple[float, ...]
    large_tokens_per_parameter: tuple[float, ...]
    decay_share: float
    shape: str
    seeds: tuple[int, ...]

    def __post_init__(self) -> None:
        told = "not one size, or a small and a large one"
        require(len(self.sizes) in (1, 2) and len(set(self.sizes)) == len(self.sizes), "--sizes", told)
        told = f"{self.points} decays are too few to choose between the forms"
        require(self.points >= LEAST_POINTS, "--points", told, f"give {LEAST_POINTS} or more")
        check_range("--tokens-per-parameter", self.tokens_per_parameter)
        good = are_different_and_positive(self.large_tokens_per_parameter)
        require(good, "--large-tokens-per-parameter", "not different positive numbers")
        check_share("--decay-share", self.decay_share)
        check_different("--seeds", self.seeds, "seeds")

    def lengths(self) -> tuple[float, ...]:
        """D / N of every decay's end of the small model, rising."""
        low, high = self.tokens_per_parameter
        return tuple(float(each) for each in np.geomspace(low, high, self.points))


def plan_envelope(base: Recipe, settings: EnvelopeSettings, output: Path) -> Experiment:
    """Trunks and decays of both sizes and every seed.

    Raises:
        UserError: a size that does not divide into heads, a large model that is not larger, points that are the same
            step, a decay that begins in the warmup, an unknown shape, or a batch that grows.
    """
    timeline = Timeline(base)
    lengths = (settings.lengths(), tuple(sorted(settings.large_tokens_per_parameter)))
    options = ("--points", "--large-tokens-per-parameter")
    cells: list[Cell] = []
    for seed in settings.seeds:
        for size, own, option in zip(settings.sizes, lengths, options, strict=False):
            series = Series(
                size, own, settings.decay_share, settings.shape, seed, option, trunk_evaluations=_TRUNK_EVALUATIONS
            )
            cells += make_series(timeline, output, series)
    by_size = {(cell.labels["width"], cell.labels["layers"]): cell.parameters for cell in cells}
    counts = [by_size[size] for size in settings.sizes]
    names = [size_name(*size) for size in settings.sizes]
    if len(names) == 2:
        told = f"{names[1]} has {counts[1]:,} parameters and {names[0]} {counts[0]:,}: the large one is not larger"
        require(counts[0] < counts[1], "--sizes", told, "give the small one first")
    beside = f", beside {names[1]}" if len(names) == 2 else ""
    title = f"Loss envelope of {names[0]} under continued training{beside} (section 4.3 of arXiv 2404.06395)"
    notes = (format_savings(shared_costs(cells)),)
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate_envelope, notes)
