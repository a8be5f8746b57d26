"""The largest update of an element of every weight matrix from one checkpoint to the next (figure 7).

Two checkpoints are read tensor by tensor, whatever layout wrote them, so that never more than one matrix of each is in
memory.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path

import numpy as np

from minicpm_megatron.checkpoint.find import CHECKPOINTS
from minicpm_megatron.checkpoint.names import step_folder
from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.decay_statistics import largest_update
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.storage.manifest import problems
from minicpm_megatron.storage.sharded import CheckpointReader
from minicpm_megatron.training.metrics import METRICS, read_metrics
from minicpm_megatron.windtunnel.cells import Cell
from minicpm_megatron.windtunnel.decay_stage.series import finished_pairs
from minicpm_megatron.windtunnel.experiment import Experiment

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
        folders = {step: step_folder(trunk.folder / CHECKPOINTS, step) for step in steps}
        for first, last in zip(steps[:-1], steps[1:], strict=True):
            window = BEFORE if last <= leaves else CONTROL
            found += _between(trunk, window, first, last, folders[first], folders[last])
        folders |= {step: step_folder(decay.folder / CHECKPOINTS, step) for step in steps if step > leaves}
        for first, last in zip(steps[:-1], steps[1:], strict=True):
            if first >= leaves:
                found += _between(decay, DECAY, first, last, folders[first], folders[last])
    return found


def _between(cell: Cell, window: str, first: int, last: int, before: Path, after: Path) -> list[MatrixUpdate]:
    for folder in (before, after):
        damage = problems(folder)
        if damage:
            raise UserError(f"the checkpoint is damaged: {damage[0]}", where=str(folder))
    records = read_metrics(cell.folder / METRICS)
    rate = float(np.mean([record["lr"] for record in records if first < record["step"] <= last]))
    one, other = CheckpointReader(before), CheckpointReader(after)
    return [
        MatrixUpdate(
            cell.labels["seed"], window, first, last, rate, name, largest_update(one.read(name), other.read(name))
        )
        for name in sorted(one.names())
        if len(one.shape(name)) == 2
    ]


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
