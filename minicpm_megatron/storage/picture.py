"""Pictures: one style for all, drawn without a screen, and in a folder only when they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minicpm_megatron.storage.atomic import atomic_file

DOTS_PER_INCH = 130
VALIDATION_LOSS = "validation loss (nats per token)"
LEARNING_RATE = "learning rate"

# Okabe and Ito's colours without yellow: they are told apart by colour-blind readers, too
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#7f7f7f")
OURS, PAPER, CONTROL = COLOURS[0], COLOURS[1], COLOURS[6]
DECAY_COLOUR = "#e8eef7"  # behind the steps of a decay
STYLE: dict[str, Any] = {
    "figure.constrained_layout.use": True,
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e9e9e9",
    "grid.linewidth": 0.6,
    "axes.prop_cycle": f"cycler('color', {list(COLOURS)})",
    "lines.linewidth": 1.4,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.title_fontsize": 8,
    "image.cmap": "viridis",
}


def offscreen_pyplot() -> Any:
    """matplotlib.pyplot without a screen, in the style of all pictures; imported in here because it takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.style.use(STYLE)
    return pyplot


def shades(count: int) -> list[Any]:
    """`count` colours for what has an order, dark to light."""
    return [offscreen_pyplot().cm.viridis(0.85 * place / max(1, count - 1)) for place in range(count)]


def legend_beside(axis: Any, **options: Any) -> None:
    """A legend to the right of the axes, where it covers no data."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, **options)


def legend_below(figure: Any, handles: Any, **options: Any) -> None:
    """One legend under all panels of a figure."""
    figure.legend(handles=handles, loc="outside lower center", ncols=options.pop("ncols", len(handles)), **options)


def mark(label: str, **style: Any) -> Any:
    """A legend's entry for a kind of mark, whatever its colour in the panels."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **({"color": "#555555"} | style))


def whole_steps(axis: Any) -> None:
    """Ticks of an x axis of steps at whole, round numbers."""
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axis.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")


def save_picture(figure: Any, path: Path) -> Path:
    """Write `figure` as PNG to `path` atomically, close it, and return `path`."""
    try:
        with atomic_file(path) as handle:
            figure.savefig(handle, format="png", dpi=DOTS_PER_INCH)
    finally:
        offscreen_pyplot().close(figure)
    return path
