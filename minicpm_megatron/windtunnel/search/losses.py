"""What the runs of a search have come to, read from their cells."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from minicpm_megatron.windtunnel import progress
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.experiment import Experiment
from minicpm_megatron.windtunnel.search.space import AXES, Values


@dataclass(frozen=True)
class Result:
    """One trial and what it gave.

    Attributes:
        number: from 0, which is the paper's set.
        loss: held out, nats per token; infinite where it diverged, nan where there is none (yet).
        repeats: the same with other seeds, seed -> loss.
    """

    number: int
    values: Values
    loss: float
    repeats: dict[int, float]


def loss_of(cell: Cell) -> float:
    """Held-out loss in nats per token; infinite where the run diverged, nan where there is none."""
    if not progress.is_done(cell):
        return math.nan
    return progress.measured(cell).held_out if progress.divergence(cell) is None else math.inf


def read_results_of(experiment: Experiment) -> list[Result]:
    """Every trial by its number."""
    found: list[Result] = []
    for cell in experiment.every_cell():  # trials before their repeats, by number
        labels = cell.labels
        if labels["role"] == "trial":
            values = {axis.name: labels[axis.name] for axis in AXES}
            found.append(Result(labels["number"], values, loss_of(cell), {}))
        else:
            found[labels["number"]].repeats[labels["seed"]] = loss_of(cell)
    return found


def rival(losses: Sequence[float]) -> int | None:
    """Number of the best trial but the paper's; None where no other has a loss."""
    others = [(loss, number) for number, loss in enumerate(losses) if number and math.isfinite(loss)]
    return min(others)[1] if others else None
