"""The load of the experts as a picture, from a run's metrics."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.storage.picture import offscreen_pyplot, save_picture
from minicpm_megatron.training.metrics import EXPERTS, METRICS, read_metrics

PICTURE = "experts.png"


def finish_experts(folder: Path) -> None:
    """Draw how evenly the experts of a run were used, if it has any, and say it in a line."""
    records = read_metrics(folder / METRICS, EXPERTS)
    if not records:
        return
    draw_experts(folder)
    last = records[-1]["layers"]
    shares = [share for layer in last for share in layer["share"]]
    print(
        f"experts served from {min(shares):.1%} to {max(shares):.1%} of their layers' tokens at the end (even: "
        f"{1 / len(last[0]['share']):.1%}); picture: {folder / PICTURE}"
    )


def draw_experts(folder: Path) -> Path:
    """Share of every expert in every layer at the end, and the evenness over the steps; into the run's folder."""
    pyplot = offscreen_pyplot()
    records = read_metrics(folder / METRICS, EXPERTS)
    last = records[-1]["layers"]
    experts, layers = len(last[0]["share"]), [layer["layer"] for layer in last]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    shares = [[share * experts for share in layer["share"]] for layer in last]
    image = left.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if len(shares) <= 12:
                left.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=8)
    left.set(
        title=f"load at step {records[-1]['step']}, 1 is even",
        xlabel="expert",
        ylabel="layer",
        xticks=range(experts),
        yticks=range(len(layers)) if len(layers) <= 12 else range(0, len(layers), 4),
    )
    left.set_yticklabels(layers if len(layers) <= 12 else layers[::4])
    figure.colorbar(image, ax=left)
    colours = pyplot.get_cmap("viridis")
    for place, number in enumerate(layers):
        points = [
            (record["step"], layer["evenness"])
            for record in records
            for layer in record["layers"]
            if layer["layer"] == number
        ]
        right.plot(*zip(*points, strict=True), color=colours(place / max(1, len(layers) - 1)), linewidth=1.2)
    right.set(
        title="evenness of the load, a line a layer (dark: first)", xlabel="step", ylabel="entropy / log(experts)"
    )
    right.grid(alpha=0.3)
    return save_picture(figure, folder / PICTURE)
