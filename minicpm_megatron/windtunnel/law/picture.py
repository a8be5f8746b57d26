"""Fitted scaling laws as pictures, after figures 9, 10 and 17: one panel a held-out set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minicpm_megatron.methods.economics import training_flops
from minicpm_megatron.methods.scaling_law import COMPUTE_UNIT, Array, Method
from minicpm_megatron.storage.picture import (
    OURS,
    PAPER,
    legend_beside,
    offscreen_pyplot,
    save_picture,
    shades,
)
from minicpm_megatron.training.metrics import human
from minicpm_megatron.windtunnel.law.fits import METHODS, SetFits
from minicpm_megatron.windtunnel.law.losses import BILLION
from minicpm_megatron.windtunnel.results import Picture

CONTOUR, SIZES, COMPUTE, FITTED = "contour.png", "sizes.png", "compute.png", "fitted.png"
_MARGIN = 1.6  # of the axes around the points, a factor
_LEVELS = 14
_MOST_COLUMNS = 3
_MOST_NAMED = 7  # sizes that have room for their names below an axis


def draw_law(
    found: Sequence[SetFits], method: Method, compute: float, output: Path, *, loss: str
) -> tuple[Picture, ...]:
    """Write the four pictures into `output`; `method` is the fit of the first three, `loss` the loss and its unit."""
    seen = draw_contour(found, method, compute, output / CONTOUR, loss)
    optimum = ", and the sizes and tokens that are best for their compute" if seen else ""
    draw_sizes(found, method, output / SIZES, loss)
    draw_compute(found, method, output / COMPUTE, loss)
    draw_fitted(found, output / FITTED, loss)
    return (
        Picture(CONTOUR, f"L(N, D) by {method} with the measured points{optimum}"),
        Picture(SIZES, f"Loss of each size over tokens, and its curve by {method}"),
        Picture(COMPUTE, f"Loss of each size over compute 6 N D, and its curve by {method} (figure 9)"),
        Picture(FITTED, "Fitted against measured loss, by both methods"),
    )


def draw_contour(found: Sequence[SetFits], method: Method, compute: float, path: Path, loss: str) -> bool:
    """L over N and D, the points in the colour of their loss, N_opt and D_opt; a star at `compute` where it is seen.

    Returns:
        Whether N_opt and D_opt are in the picture: they can be far from all that was measured, as the panel then says.
    """
    seen = []

    def draw(figure: Any, axis: Any, each: SetFits) -> None:
        law, losses = each.fits[method].law, each.losses
        n = np.geomspace(losses.n.min() / _MARGIN, losses.n.max() * _MARGIN, 120)
        d = np.geomspace(losses.d.min() / _MARGIN, losses.d.max() * _MARGIN, 120)
        grid = law.loss(n[None, :], d[:, None])
        drawn = axis.contourf(n * BILLION, d * BILLION, grid, levels=_LEVELS, cmap="viridis_r")
        style = {"c": losses.loss, "cmap": drawn.cmap, "norm": drawn.norm, "edgecolors": "black", "linewidths": 0.6}
        axis.scatter(losses.n * BILLION, losses.d * BILLION, s=28, label="measured", **style)
        budgets = np.geomspace(6 * COMPUTE_UNIT * n[0] * d[0], 6 * COMPUTE_UNIT * n[-1] * d[-1], 200)
        line = np.array([(law.n_opt(budget), law.d_opt(budget)) for budget in budgets])
        # beyond the window a line would only be clipped
        note = None
        line = line[(line[:, 0] > n[0]) & (line[:, 0] < n[-1]) & (line[:, 1] > d[0]) & (line[:, 1] < d[-1])]
        if len(line):
            axis.plot(*(line * BILLION).T, color=PAPER, label="best for its compute")
            seen.append(each)
        else:
            middle = 6 * COMPUTE_UNIT * float(np.sqrt(n[0] * n[-1] * d[0] * d[-1]))
            ratio, tried = law.d_opt(middle) / law.n_opt(middle), float(np.median(losses.d / losses.n))
            note = (
                f"best for {middle:.2g} FLOPs: {human(ratio).strip()} tokens a parameter,"
                f"\noutside the picture (measured: about {human(tried).strip()})"
            )
        best = law.n_opt(compute), law.d_opt(compute)
        if n[0] < best[0] < n[-1] and d[0] < best[1] < d[-1]:
            label = f"best for {compute:.3g} FLOPs"
            axis.plot(best[0] * BILLION, best[1] * BILLION, "*", color=PAPER, markersize=11, label=label)
        axis.set(xscale="log", yscale="log", xlabel="N, parameters without embeddings", ylabel="D, tokens trained on")
        axis.grid(False)
        axis.xaxis.set_minor_formatter("")  # in a range of less than two decades they would write over one another
        if len(losses.sizes) <= _MOST_NAMED:
            axis.set_xticks([size * BILLION for size in losses.sizes])
            axis.xaxis.set_major_formatter(lambda value, _: human(value).strip())
        # opaque: it lies on colours
        axis.legend(loc="lower right", frameon=True, framealpha=0.9, title=note)
        figure.colorbar(drawn, ax=axis, label=loss)

    _panels(found, path, draw)
    return bool(seen)


def draw_sizes(found: Sequence[SetFits], method: Method, path: Path, loss: str) -> Path:
    """Loss over D, a colour a size, with the law's curve of each."""

    def place(axis: Any) -> None:
        axis.set(xscale="log", xlabel="D, tokens trained on", ylabel=loss)

    return _draw_by_size(found, method, path, lambda size, d: d * BILLION, place)


def draw_compute(found: Sequence[SetFits], method: Method, path: Path, loss: str) -> Path:
    """Loss over compute on log axes, as figure 9: where curves of two sizes meet, the larger takes over."""

    def place(axis: Any) -> None:
        axis.set(xscale="log", yscale="log", xlabel="compute 6 N D (FLOPs)", ylabel=loss)
        axis.yaxis.set_minor_formatter("")  # less than two decades: only some of the minor ticks have room
        low, high = axis.get_ylim()
        axis.set_yticks([float(f"{value:.2g}") for value in np.geomspace(low, high, 6)[1:-1]])
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")

    return _draw_by_size(found, method, path, lambda size, d: training_flops(size * BILLION, 1.0) * d * BILLION, place)


def _draw_by_size(
    found: Sequence[SetFits],
    method: Method,
    path: Path,
    along: Callable[[float, Array], Array],
    place: Callable[[Any], None],
) -> Path:
    """Points and fitted curve of each size.

    Args:
        along: N and D in 1e9 -> where on the horizontal axis.
        place: sets scales and labels of an axis that everything is drawn on.
    """

    def draw(figure: Any, axis: Any, each: SetFits) -> None:
        law, losses = each.fits[method].law, each.losses
        for size, colour in zip(losses.sizes, shades(len(losses.sizes)), strict=True):
            own = losses.n == size
            d = np.geomspace(losses.d[own].min() / _MARGIN, losses.d[own].max() * _MARGIN, 100)
            axis.plot(along(size, losses.d[own]), losses.loss[own], "o", markersize=4, color=colour)
            axis.plot(along(size, d), law.loss(size, d), linewidth=1, color=colour, label=human(size * BILLION).strip())
        place(axis)
        legend_beside(axis, title="N\n(points: measured,\nlines: the law)")

    return _panels(found, path, draw)


def draw_fitted(found: Sequence[SetFits], path: Path, loss: str) -> Path:
    """Each method's fitted loss over the measured one, and the line on which they are equal."""

    def draw(figure: Any, axis: Any, each: SetFits) -> None:
        ends = [each.losses.loss.min(), each.losses.loss.max()]
        axis.plot(ends, ends, color="#888888", linewidth=1, label="fitted = measured")
        for method, marker, colour in zip(METHODS, "ox", (OURS, PAPER), strict=True):
            fit = each.fits[method]
            label = f"{method}, residual {fit.error:.2g}"
            style = {"color": colour, "markersize": 5, "alpha": 0.8, "label": label}
            axis.plot(each.losses.loss, each.losses.loss - fit.residuals, marker, **style)
        axis.set(xlabel=f"measured {loss}", ylabel=f"fitted {loss}")
        legend_beside(axis)

    return _panels(found, path, draw)


def _panels(found: Sequence[SetFits], path: Path, draw: Callable[[Any, Any, SetFits], None]) -> Path:
    columns = min(_MOST_COLUMNS, len(found))
    rows = -(-len(found) // columns)
    figure, axes = offscreen_pyplot().subplots(rows, columns, figsize=(1 + 5.2 * columns, 3.9 * rows), squeeze=False)
    for axis in axes.flat[len(found) :]:
        axis.set_visible(False)
    for axis, each in zip(axes.flat, found, strict=False):
        draw(figure, axis, each)
        axis.set_title(each.losses.name, loc="left")
    return save_picture(figure, path)
