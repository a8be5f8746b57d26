"""Accuracy over length and depth as a picture."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.evaluation.retrieval import Cell
from minicpm_megatron.storage.picture import offscreen_pyplot, save_picture

PICTURE = "heat_map.png"
_MEASURES = {"exact_match": "exact match", "token_accuracy": "token accuracy"}


def draw_heat_map(cells: list[Cell], title: str, folder: Path) -> Path:
    """Write `heat_map.png`: a column a length, a row a depth, dark for 0 % and bright for 100 %."""
    pyplot = offscreen_pyplot()
    lengths, depths = sorted({cell.length for cell in cells}), sorted({cell.depth for cell in cells})
    places = {(cell.length, cell.depth): cell for cell in cells}
    width, height = 2.2 + 0.85 * len(lengths), 1.9 + 0.45 * len(depths)
    figure, axes = pyplot.subplots(1, len(_MEASURES), figsize=(2 * width + 0.8, height), sharey=True)
    for axis, (measure, name) in zip(axes, _MEASURES.items(), strict=True):
        values = [[100 * getattr(places[length, depth], measure) for length in lengths] for depth in depths]
        image = axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
        axis.set_title(name)
        axis.grid(False)
        axis.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths])
        axis.set_yticks(range(len(depths)), [f"{depth:g}" for depth in depths])
        axis.set_xlabel("length (tokens)")
        for row, line in enumerate(values):
            for column, value in enumerate(line):
                axis.text(
                    column, row, f"{value:.0f}", ha="center", va="center", color="white" if value < 60 else "black"
                )
    axes[0].set_ylabel("depth (% of the text that stands before)")
    figure.suptitle(title, fontsize=11)
    figure.colorbar(image, ax=axes, label="% of the questions, or of the answers' tokens")
    return save_picture(figure, folder / PICTURE)
