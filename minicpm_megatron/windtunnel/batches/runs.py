"""The runs behind the batch-size law of section 3.2: every size at every batch size, each on the same tokens.

The loss is the held-out one, every so many tokens: unlike that of the batches it is not noisier for a small batch.
Section 3.2 names a cosine schedule, `schedule="cosine"` here, whose period is the run's length. By default the learning
rate is constant after the warmup, so that the loss after every amount of tokens is that of a run which need not have
known its length. Warmup, too, is an amount of tokens and not of steps. All runs have the recipe's learning rate,
whatever their batch, as in the paper.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from minicpm_megatron.errors import require
from minicpm_megatron.recipe import Recipe
from minicpm_megatron.windtunnel.batches.findings import Reading, evaluate_batches
from minicpm_megatron.windtunnel.branching import Timeline
from minicpm_megatron.windtunnel.cells import make_cell, model_of_size, size_name
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.settings import check_different

KIND = "batch-size"
LEAST_BATCHES = 4  # a parabola, and one point that says how well it fits
LEAST_EVALUATIONS = 4


@dataclass(frozen=True)
class BatchSettings:
    """What is asked for.

    Attributes:
        sizes: (width, layers) of each model.
        batches: batch sizes in tokens.
        seeds: each decides initial weights and sample order.
        tokens: of each run; rounded up to a whole number of evaluations.
        evaluations: of each run at most.
        schedule: after the warmup: "constant", or "cosine" down to its floor at the end of the run.
    """

    sizes: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    seeds: tuple[int, ...]
    tokens: float
    evaluations: int
    schedule: Literal["constant", "cosine"] = "constant"

    def __post_init__(self) -> None:
        check_different("--sizes", self.sizes, "sizes")
        check_different("--batches", self.batches, "batch sizes", LEAST_BATCHES)
        require(min(self.batches) > 0, "--batches", f"{min(self.batches)} is no batch size")
        check_different("--seeds", self.seeds, "seeds")
        require(0 < self.tokens < math.inf, "--tokens", f"{self.tokens:g} is no amount of tokens")
        require(self.evaluations >= LEAST_EVALUATIONS, "--evaluations", f"{self.evaluations} make no curve")


def plan_batches(
    base: Recipe, settings: BatchSettings, reading: Reading, output: Path, held_out_samples: int
) -> Experiment:
    """A run for every size, batch size and seed.

    Args:
        reading: what the finished runs are asked; it decides no run, so that another one needs none.
        held_out_samples: of the smallest held-out set.

    Raises:
        UserError: a size that does not divide into heads, a batch that is no whole number of samples, a batch or
            samples that grow, or runs that are too short.
    """
    timeline = Timeline(base)
    require(not base.data.curriculum, "data.curriculum", "the loss of shorter samples is another one")
    length = base.data.sequence_length
    odd = next((batch for batch in settings.batches if batch % length), 0)
    require(not odd, "--batches", f"{odd} tokens are no whole samples of {length}", f"give multiples of {length}")
    samples = [batch // length for batch in settings.batches]
    interval = _interval(settings, samples, length)
    held_out = _held_out(base, samples, held_out_samples)
    warmup = timeline.warmup_steps * timeline.tokens_per_step
    total = math.ceil(settings.tokens / interval) * interval
    evaluations = (total - warmup) // interval
    told = f"{settings.tokens:g} tokens are {evaluations} evaluations after the {warmup:,} tokens of warmup"
    require(evaluations >= LEAST_EVALUATIONS, "--tokens", told, "give more tokens, or a shorter schedule.warmup")
    cells = []
    for size, batch, seed in itertools.product(settings.sizes, settings.batches, settings.seeds):
        width, layers = size
        # no cell takes more at once than the recipe allows; which of it divides depends on the batch
        given = base.training.micro_batch_size
        micro = given if given == "auto" else math.gcd(batch // length, given)
        overrides = {
            **model_of_size(base, width, layers),
            "training.global_batch_size": batch // length,
            "training.micro_batch_size": micro,
            "training.seed": seed,
            "schedule": {"shape": settings.schedule, "unit": "tokens", "warmup": warmup, "total": total},
            "evaluation.interval": interval // batch,
            "evaluation.batches": held_out // (batch // length),
        }
        labels = {"width": width, "layers": layers, "batch_tokens": batch, "seed": seed}
        cells.append(make_cell(base, output, f"{size_name(*size)}-batch{batch}-s{seed}", overrides, labels))
    names = ", ".join(size_name(*each) for each in settings.sizes)
    read = min(held_out, held_out_samples)
    title = f"Batch size over loss of {names} (section 3.2 of arXiv 2404.06395)"
    notes = (
        f"every run: {total:,} tokens under a {settings.schedule} learning rate, {evaluations} evaluations on"
        f" {read:,} samples a set, which are not in the FLOPs",
    )
    evaluate = partial(evaluate_batches, reading=reading)
    return Experiment(KIND, title, asdict(settings), base, tuple(cells), output, evaluate, notes)


def _interval(settings: BatchSettings, samples: Sequence[int], length: int) -> int:
    """Tokens between evaluations: whole steps of every batch size."""
    common = math.lcm(*samples) * length
    return math.ceil(settings.tokens / settings.evaluations / common) * common


def _held_out(base: Recipe, samples: Sequence[int], there: int) -> int:
    """Samples of each evaluation: as many as the recipe asks for or more, in whole batches of every size.

    All runs are judged on the same text so; a smaller set is read to its end by all of them.
    """
    batches, common = base.evaluation.batches, math.lcm(*samples)
    asked = there if batches is None else batches * base.training.global_batch_size
    return math.ceil(asked / common) * common
