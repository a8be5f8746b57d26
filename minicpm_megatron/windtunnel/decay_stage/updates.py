"""The largest update of an element of every weight matrix from one checkpoint to the next (figure 7).

Two checkpoints are read tensor by tensor, whatever layout wrote them, so that never more than one matrix of each is in
memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.checkpoint.names import step_folder
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.storage.manifest import problems
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.decay_stage.series import finished_pairs
from minicpm_megatron.windtunnel.experiment import Experiment

if TYPE_CHECKING:
    from minicpm_megatron.storage.sharded import CheckpointReader

BEFORE, DECAY, CONTROL = "before", "decay", "control"


@dataclass(frozen=True)
class MatrixUpdate:
    """One matrix between two checkpoints.

    Attributes:
        seed: of the run.
        window: "before", "decay", or "control" for the trunk's steps beside the decay.
        first, last: steps of the two checkpoints.
        rate: mean base rate of the steps between.
        matrix: name in the checkpoint.
        largest: max_ij |W_ij(last) - W_ij(first)|.
    """

    seed: int
    window: str
    first: int
    last: int
    rate: float
    matrix: str
    largest: float


def read_updates(experiment: Experiment) -> list[MatrixUpdate]:
    """Of every seed whose runs are done, in the order of steps.

    Raises:
        UserError: a checkpoint is missing or damaged.
    """
    found = []
    for trunk, decay in finished_pairs(experiment):
        steps, leaves = list(decay.labels["saved"]), decay.first_step
        own = {step: _open(trunk, step) for step in steps}
        past, control = [step for step in steps if step <= leaves], [step for step in steps if step >= leaves]
        found += _updates(trunk, BEFORE, {step: own[step] for step in past})
        found += _updates(trunk, CONTROL, {step: own[step] for step in control})
        found += _updates(decay, DECAY, {step: own[step] if step == leaves else _open(decay, step) for step in control})
    return found


def _open(cell: Cell, step: int) -> CheckpointReader:
    folder = step_folder(cell.folder / CHECKPOINTS, step)
    damage = problems(folder)
    if damage:
        raise UserError(f"the checkpoint is damaged: {damage[0]}", where=str(folder))
    # seconds of torch, once something is measured
    from minicpm_megatron.storage.sharded import CheckpointReader

    return CheckpointReader(folder)


def _updates(cell: Cell, window: str, checkpoints: Mapping[int, CheckpointReader]) -> list[MatrixUpdate]:
    """From each of the checkpoints, by rising step, to the next."""
    from minicpm_megatron.methods.decay_statistics import largest_update

    rates = {record["step"]: record["lr"] for record in read_metrics(cell.folder / METRICS, needs=("lr",))}
    seed, found = cell.labels["seed"], []
    for (first, one), (last, other) in pairwise(checkpoints.items()):
        mean_rate = float(np.mean([rate for step, rate in rates.items() if first < step <= last]))
        for name in sorted(one.names()):
            if len(one.shape(name)) == 2:
                largest = largest_update(one.read(name), other.read(name))
                found.append(MatrixUpdate(seed, window, first, last, mean_rate, name, largest))
    return found


def write_updates(updates: Sequence[MatrixUpdate], path: Path) -> None:
    """As CSV, a line a matrix and interval."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([each.name for each in fields(MatrixUpdate)])
    writer.writerows(astuple(each) for each in updates)
    write_bytes(path, text.getvalue().encode())


def kind_of(matrix: str) -> str:
    """The name without the number of its layer: matrices of one kind."""
    return ".".join(part for part in matrix.split(".") if not part.isdecimal()).removesuffix(".weight")
