"""In how many steps one optimizer reaches the tuned loss of another, from learning-rate sweeps of the wind tunnel.

    bash examples/windtunnel.sh muon
    python -m benchmarks.optimizer_steps runs/windtunnel/muon --picture docs/images/muon.png

FOLDER holds a learning-rate sweep (`minicpm windtunnel lr --parametrizations mup`) a subfolder, called OPTIMIZER-STEPS:
one of AdamW, and several of one challenger, each with a schedule of its own length. Every sweep is tuned: its loss is
that of the rate whose mean over seeds is least. Between two lengths the challenger's loss is interpolated linearly in
log steps, for each seed. Sizes, seeds, data and batch are the same throughout.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_megatron.errors import UserError, require
from minicpm_megatron.methods.rate_law import optimal_rate
from minicpm_megatron.storage.picture import VALIDATION_LOSS, legend_beside, offscreen_pyplot, save_picture, shades

Size = tuple[int, int]


@dataclass(frozen=True)
class Sweep:
    """Losses of one optimizer and one length.

    Attributes:
        rates: rising.
        losses: size -> [seeds, rates], nan where a run diverged.
    """

    optimizer: str
    steps: int
    rates: tuple[float, ...]
    losses: dict[Size, np.ndarray]

    def tuned(self, size: Size) -> np.ndarray:
        """Return [seeds], the losses at the learning rate of the grid whose mean loss over seeds is least."""
        table = self.losses[size]
        means = table.mean(axis=0)
        if np.isnan(means).all():
            return np.full(len(table), np.nan)
        return table[:, int(np.nanargmin(means))]

    def best_rate(self, size: Size) -> float:
        """Return the minimum of a parabola of the loss over log2 of the learning rate; nan at an end of the grid."""
        try:
            return optimal_rate(self.rates, self.losses[size]).rate
        except UserError:
            return float("nan")


def read_sweep(folder: Path) -> Sweep:
    """Read the results of one sweep.

    Raises:
        UserError: its name is not OPTIMIZER-STEPS, or it has no results of a learning-rate sweep under muP alone.
    """
    named = re.fullmatch(r"(.+)-(\d+)", folder.name)
    if named is None:
        raise UserError("not called OPTIMIZER-STEPS", where=str(folder), fix="rename it, for instance muon-200")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    require(results.get("kind") == "lr", str(folder), "not a learning-rate sweep")
    alone = {cell["labels"]["parametrization"] for cell in results["cells"]} == {"mup"}
    require(alone, str(folder), "has other parametrizations than muP", "sweep with --parametrizations mup")
    cells = {
        (cell["labels"]["width"], cell["labels"]["layers"], cell["labels"]["seed"], cell["labels"]["rate"]): cell
        for cell in results["cells"]
    }
    rates, seeds = sorted({key[3] for key in cells}), sorted({key[2] for key in cells})
    losses = {
        size: np.array([[_held_out(cells[*size, seed, rate]) for rate in rates] for seed in seeds])
        for size in sorted({key[:2] for key in cells})
    }
    return Sweep(named[1], int(named[2]), tuple(rates), losses)


def _held_out(cell: dict[str, Any]) -> float:
    return float("nan") if cell["held_out"] is None else float(cell["held_out"])


def steps_to(losses: Sequence[float], steps: Sequence[int], wanted: float) -> float:
    """Return the steps at which the loss first falls to `wanted`, interpolated in log steps; nan outside the runs.

    Args:
        steps: rising.
    """
    for number in range(1, len(steps)):
        before, after = losses[number - 1], losses[number]
        if before >= wanted >= after:
            share = (before - wanted) / (before - after) if before > after else 0.0
            first, second = np.log(steps[number - 1 : number + 1])
            return float(np.exp(first + share * (second - first)))
    return float("nan")


@dataclass(frozen=True)
class Comparison:
    """AdamW's sweep and the challenger's, by rising steps."""

    reference: Sweep
    challenger: tuple[Sweep, ...]

    @classmethod
    def of(cls, folder: Path) -> Comparison:
        """Read and check the sweeps of a folder.

        Raises:
            UserError: they are not one of AdamW and two or more of one other optimizer, of which one is as long.
        """
        sweeps = [read_sweep(path.parent) for path in sorted(folder.glob("*/results.json"))]
        references = [sweep for sweep in sweeps if sweep.optimizer == "adamw"]
        others = sorted((sweep for sweep in sweeps if sweep.optimizer != "adamw"), key=lambda sweep: sweep.steps)
        require(
            len(references) == 1, str(folder), f"{len(references)} sweeps called adamw-STEPS", "one is compared with"
        )
        same = len(others) >= 2 and len({sweep.optimizer for sweep in others}) == 1
        require(same, str(folder), "not two or more sweeps of one other optimizer")
        [reference] = references
        alike = all(
            sweep.losses.keys() == reference.losses.keys()
            and all(len(sweep.losses[size]) == len(reference.losses[size]) for size in sweep.losses)
            for sweep in others
        )
        require(alike, str(folder), "sweeps of different sizes or seeds")
        equal = any(sweep.steps == reference.steps for sweep in others)
        require(equal, str(folder), f"no other sweep of {reference.steps} steps")
        return cls(reference, tuple(others))

    @property
    def equally_long(self) -> tuple[Sweep, Sweep]:
        """AdamW's sweep and the challenger's of as many steps."""
        return self.reference, next(sweep for sweep in self.challenger if sweep.steps == self.reference.steps)

    def shares(self, size: Size) -> np.ndarray:
        """Return [seeds]: the challenger's steps to the tuned loss of AdamW, divided by AdamW's steps."""
        tuned = [sweep.tuned(size) for sweep in self.challenger]
        steps = [sweep.steps for sweep in self.challenger]
        found = [
            steps_to([losses[seed] for losses in tuned], steps, wanted)
            for seed, wanted in enumerate(self.reference.tuned(size))
        ]
        return np.array(found) / self.reference.steps


def draw(comparison: Comparison, path: Path) -> Path:
    """Draw the loss over the learning rate, one colour for each size, and the share of steps over the width."""
    pyplot = offscreen_pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11.5, 4.2))
    sizes = list(comparison.reference.losses)
    for sweep, style in zip(comparison.equally_long, (":", "-"), strict=True):
        for size, colour in zip(sizes, shades(len(sizes)), strict=True):
            label = f"{sweep.optimizer}, width {size[0]}"
            means = sweep.losses[size].mean(axis=0)
            left.plot(sweep.rates, means, linestyle=style, marker="o", markersize=4, color=colour, label=label)
    left.set_xscale("log", base=2)
    rates = sorted({rate for sweep in comparison.equally_long for rate in sweep.rates})
    left.set_xticks(rates, [f"{rate:.3g}" for rate in rates], fontsize=8)
    left.set_xlabel("base learning rate")
    left.set_ylabel(VALIDATION_LOSS)
    legend_beside(left)
    widths = [size[0] for size in sizes]
    shares = [comparison.shares(size) for size in sizes]
    right.plot(widths, [share.mean() for share in shares], marker="o", linewidth=1)
    for width, share in zip(widths, shares, strict=True):
        right.plot([width] * len(share), share, linestyle="", marker=".", markersize=4, color="tab:gray")
    right.axhline(1, linestyle="--", linewidth=0.8, color="tab:gray")
    right.set_xscale("log", base=2)
    right.set_xticks(widths, [str(width) for width in widths])
    right.set_xlabel("width")
    right.set_ylabel("steps to AdamW's tuned loss / AdamW's steps")
    return save_picture(figure, path)


def main() -> int:
    """Print the table of sizes, and how far best rates move; draw the picture if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the sweeps")
    parser.add_argument("--picture", type=Path, help="PNG to draw")
    options = parser.parse_args()
    try:
        comparison = Comparison.of(options.folder)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rows, sizes = comparison.equally_long, list(comparison.reference.losses)
    heads = [f"{each.optimizer}: best rate | loss" for each in rows]
    steps = comparison.reference.steps
    print(f"| width x layers | {' | '.join(heads)} | steps to AdamW's loss / {steps}, and of each seed |")
    print("| --- " * (2 + 2 * len(rows)) + "|")
    for size in sizes:
        cells = [f"{each.best_rate(size):.4f} | {each.tuned(size).mean():.4f}" for each in rows]
        share = comparison.shares(size)
        told = f"{share.mean():.2f} ({', '.join(f'{each:.2f}' for each in share)})"
        print(f"| {size[0]}x{size[1]} | {' | '.join(cells)} | {told} |")
    for each in rows:
        best = np.log2([each.best_rate(size) for size in sizes])
        print(f"{each.optimizer}: best rates within {best.max() - best.min():.2f} octaves; a grid step is 1")
    if options.picture:
        print(f"picture: {draw(comparison, options.picture)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
