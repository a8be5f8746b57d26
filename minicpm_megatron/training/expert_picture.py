"""The load of the experts as a picture, from a run's metrics."""

from __future__ import annotations

from pathlib import Path

from minicpm_megatron.storage.picture import legend_beside, offscreen_pyplot, save_picture, shades, whole_steps
from minicpm_megatron.training.metrics import EXPERTS, METRICS, read_metrics

PICTURE = "experts.png"
_MOST_NAMED = 12  # layers whose numbers and shares have room to be written
_MOST_IN_A_COLUMN = 16  # of the legend


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
    evenness = {
        number: [
            (record["step"], layer["evenness"])
            for record in records
            for layer in record["layers"]
            if layer["layer"] == number
        ]
        for number in layers
    }
    # of one measurement there is no curve
    over_steps = len(records) > 1
    figure, axes = pyplot.subplots(1, 1 + over_steps, figsize=(5.5 + 6.5 * over_steps, 4.2), squeeze=False)
    left = axes[0][0]
    shares = [[share * experts for share in layer["share"]] for layer in last]
    image = left.imshow(shares, aspect="auto", cmap="RdBu_r", vmin=0, vmax=2)
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            if len(shares) <= _MOST_NAMED:
                # the ends of the scale are dark
                left.text(
                    column,
                    row,
                    f"{value:.2f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if abs(value - 1) > 0.7 else "black",
                )
    left.set(
        title=f"tokens of each expert at step {records[-1]['step']:,}",
        xlabel="expert",
        ylabel="layer",
        xticks=range(experts),
        yticks=range(len(layers)) if len(layers) <= _MOST_NAMED else range(0, len(layers), 4),
    )
    left.grid(False)
    left.set_yticklabels(layers if len(layers) <= _MOST_NAMED else layers[::4])
    figure.colorbar(image, ax=left, label="times an even share (1 / experts)", extend="max")
    if over_steps:
        right = axes[0][1]
        for number, colour in zip(layers, shades(len(layers)), strict=True):
            right.plot(*zip(*evenness[number], strict=True), color=colour, marker="o", markersize=2.5, label=number)
        right.set(
            title="evenness of the load: 1 where all experts serve alike",
            xlabel="step",
            ylabel="entropy of the shares / log(experts)",
        )
        whole_steps(right)
        legend_beside(right, title="layer", ncols=-(-len(layers) // _MOST_IN_A_COLUMN))
    return save_picture(figure, folder / PICTURE)
