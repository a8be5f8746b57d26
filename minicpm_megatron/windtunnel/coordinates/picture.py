"""The coordinate check as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from minicpm_megatron.storage.picture import COLOURS, legend_below, legend_beside, mark, offscreen_pyplot, save_picture
from minicpm_megatron.windtunnel.coordinates.measure import QUANTITIES
from minicpm_megatron.windtunnel.rates.sweep import NAMES

PICTURE = "coordinates.png"
_LINES = {"start": ":", "end": "-", "change": "--"}
_MEANINGS = {"start": "at the start", "end": "after the steps", "change": "the change between"}
_QUANTITIES = {"residual": "residual stream", "mlp": "MLP"}  # in other words than the tables'


def draw_coordinates(
    sizes: Mapping[tuple[str, str, str, str], Sequence[tuple[int, float]]],
    slopes: Mapping[tuple[str, str, str, str], float],
    path: Path,
) -> Path:
    """A row for width and one for depth, a column a parametrization, a colour a quantity; both axes logarithmic."""
    pyplot = offscreen_pyplot()
    rows = [over for over in ("width", "depth") if any(key[1] == over for key in sizes)] or ["width"]
    figure, axes = pyplot.subplots(len(rows), 2, figsize=(12, 3.8 * len(rows) + 0.4), sharey="row", squeeze=False)
    for row, over in zip(axes, rows, strict=True):
        for axis, name in zip(row, NAMES, strict=True):
            for number, quantity in enumerate(QUANTITIES):
                for when, line in _LINES.items():
                    key = (name, over, when, quantity)
                    if key in sizes:
                        said = _QUANTITIES.get(quantity, quantity)
                        label = f"{said}: {slopes[key]:+.2f}" if when == "end" and key in slopes else None
                        axis.plot(
                            *zip(*sizes[key], strict=True),
                            line,
                            marker="o",
                            markersize=3,
                            color=COLOURS[number],
                            label=label,
                        )
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
            axis.set_title(f"{NAMES[name]}, over {over}")
            axis.set_xlabel("layers" if over == "depth" else "width (hidden size)")
            if axis.get_legend_handles_labels()[0]:
                legend_beside(axis, title="slope of log size over log " + ("layers" if over == "depth" else "width"))
        row[0].set_ylabel("root mean square of an element")
    legend_below(figure, [mark(said, linestyle=_LINES[when], marker="o") for when, said in _MEANINGS.items()])
    return save_picture(figure, path)
