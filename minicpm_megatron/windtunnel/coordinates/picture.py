"""The coordinate check as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from minicpm_megatron.storage.picture import offscreen_pyplot, save_picture
from minicpm_megatron.windtunnel.coordinates.measure import QUANTITIES
from minicpm_megatron.windtunnel.rates.sweep import NAMES

PICTURE = "coordinates.png"
_LINES = {"start": ":", "end": "-", "change": "--"}
_LEGEND = "dotted: at the start; solid: after the steps; dashed: the change between"


def draw_coordinates(
    sizes: Mapping[tuple[str, str, str, str], Sequence[tuple[int, float]]],
    slopes: Mapping[tuple[str, str, str, str], float],
    path: Path,
) -> Path:
    """A row for width and one for depth, a column a parametrisation, a colour a quantity; both axes logarithmic."""
    pyplot = offscreen_pyplot()
    rows = [over for over in ("width", "depth") if any(key[1] == over for key in sizes)] or ["width"]
    figure, axes = pyplot.subplots(
        len(rows), 2, figsize=(10, 3.8 * len(rows)), sharey="row", squeeze=False, layout="constrained"
    )
    for row, over in zip(axes, rows, strict=True):
        for axis, name in zip(row, NAMES, strict=True):
            for number, quantity in enumerate(QUANTITIES):
                for when, line in _LINES.items():
                    key = (name, over, when, quantity)
                    if key in sizes:
                        label = f"{quantity} ({slopes[key]:+.2f})" if when == "end" and key in slopes else None
                        axis.plot(
                            *zip(*sizes[key], strict=True),
                            line,
                            marker="o",
                            markersize=3,
                            color=f"C{number}",
                            label=label,
                        )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.set_title(f"{NAMES[name]}, over {over} (slopes after the steps)", fontsize=10)
            axis.set_xlabel("layers" if over == "depth" else "width")
            axis.spines[["top", "right"]].set_visible(False)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(frameon=False, fontsize=8)
        row[0].set_ylabel("root mean square")
    figure.supxlabel(_LEGEND, fontsize=8)
    return save_picture(figure, path)
