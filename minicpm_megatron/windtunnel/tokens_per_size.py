"""`tokens-per-size`: where the loss curves of a family of sizes meet, from CSV, beside section 4.5's for Llama 2."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.economics import training_flops
from minicpm_megatron.methods.tokens_per_size import PUBLISHED, Crossing, Curve, FilledCurve, crossings
from minicpm_megatron.storage.checksum import file_sha256
from minicpm_megatron.storage.claim import claim
from minicpm_megatron.storage.manifest import library_versions
from minicpm_megatron.storage.picture import legend_beside, offscreen_pyplot, save_picture, shades
from minicpm_megatron.training.text import number
from minicpm_megatron.windtunnel.law.losses import Measurement
from minicpm_megatron.windtunnel.law.losses_csv import read_losses
from minicpm_megatron.windtunnel.results import Finding, Picture, Results, Table, write_results

KIND = "tokens-per-size"
PICTURE = "curves.png"


def tokens_per_size(path: Path, output: Path | None) -> Results:
    """Find the crossings of every set of a CSV; with `output` write results.json and the picture there.

    Args:
        path: see `law.losses_csv`; here a line is a point of the loss curve of a run.

    Raises:
        UserError: the CSV is wrong, has fewer than two sizes, or the output is something else's.
    """
    sets = {name: _curves(points) for name, points in read_losses(path, lambda *_: None).items()}
    found: dict[str, list[Crossing]] = {}
    for name, curves in sets.items():
        try:
            found[name] = crossings(curves)
        except UserError as error:
            raise UserError(f"set {name}: {error.where}: {error.what}", where=str(path), fix=error.fix) from None
    settings, data = {"csv": str(path)}, {str(path): file_sha256(path)}
    pictures: tuple[Picture, ...] = ()
    if output is not None:
        claim(output, {"kind": KIND, "settings": settings, "data": data}, "holds another experiment")
        _draw(sets, found, output / PICTURE)
        pictures = (Picture(PICTURE, "Loss of each size over compute, its concave parts filled, and where sizes meet"),)
    title = f"Tokens a parameter by the curves of {path.name} (section 4.5 of arXiv 2404.06395)"
    findings = tuple(_finding(name, sorted(sets[name]), each) for name, each in found.items())
    tables = tuple(_table(name, each) for name, each in found.items())
    results = Results(KIND, title, settings, "", data, library_versions(), findings, tables, pictures)
    if output is not None:
        write_results(results, output)
    return results


def _curves(points: Sequence[Measurement]) -> dict[float, Curve]:
    by_size: dict[float, list[Measurement]] = {}
    for each in points:
        by_size.setdefault(each.parameters, []).append(each)
    return {n: ([each.tokens for each in own], [each.loss for each in own]) for n, own in by_size.items()}


def _size(parameters: float) -> str:
    """13B, 36M: as model sizes are called."""
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return f"{parameters:g}"


def _finding(name: str, sizes: Sequence[float], found: Sequence[Crossing]) -> Finding:
    ratios = ", ".join(
        f"{number(each.tokens_per_parameter, 3)} ({_size(each.smaller)} to {_size(each.larger)})" for each in found
    )
    apart = len(sizes) - 1 - len(found)
    missing = f"; {apart} of {len(sizes) - 1} pairs of sizes do not meet" if apart else ""
    return Finding(
        "Tokens a parameter where the next larger model takes over (section 4.5's estimate for Llama 2)",
        f"{PUBLISHED[0]:g} to {PUBLISHED[1]:g}",
        f"{ratios or 'none'}{missing} ({name}; limits not known: one curve a size)",
        "undecided",
    )


def _table(name: str, found: Sequence[Crossing]) -> Table:
    rows = tuple(
        (
            _size(each.smaller),
            _size(each.larger),
            f"{each.compute:.3g}",
            f"{each.loss:.4f}",
            number(each.tokens_per_parameter, 3),
        )
        for each in found
    )
    return Table(f"{name}: where the curves meet", ("N", "next larger", "FLOPs", "loss", "D / N of N"), rows)


def _draw(sets: Mapping[str, Mapping[float, Curve]], found: Mapping[str, Sequence[Crossing]], path: Path) -> Path:
    figure, axes = offscreen_pyplot().subplots(1, len(sets), figsize=(1 + 6 * len(sets), 4), squeeze=False)
    for axis, (name, curves) in zip(axes.flat, sets.items(), strict=True):
        _draw_set(axis, curves, found[name])
        axis.set_title(name)
    return save_picture(figure, path)


def _draw_set(axis: Any, curves: Mapping[float, Curve], found: Sequence[Crossing]) -> None:
    for n, colour in zip(sorted(curves), shades(len(curves)), strict=True):
        tokens, loss = curves[n]
        compute = [training_flops(n, each) for each in tokens]
        axis.plot(compute, loss, ".", markersize=3, alpha=0.6, color=colour, label=_size(n))
        filled = FilledCurve.of(n, curves[n])
        axis.plot(filled.compute, filled.loss, linewidth=1, color=colour)
    if found:
        where = [each.compute for each in found], [each.loss for each in found]
        axis.plot(*where, "x", color="black", label="the larger takes over")
    axis.set(xscale="log", yscale="log", xlabel="compute 6 N D (FLOPs)", ylabel="loss (in the unit of the CSV)")
    legend_beside(axis, title="N\n(points: measured, lines:\nconcave parts filled)")
