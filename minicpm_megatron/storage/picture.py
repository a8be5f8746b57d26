"""Pictures: drawn without a screen, and in a folder only when they are whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from minicpm_megatron.storage.atomic import atomic_file

DOTS_PER_INCH = 130


def offscreen_pyplot() -> Any:
    """matplotlib.pyplot that needs no screen; imported in here because that takes a second."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def save_picture(figure: Any, path: Path) -> Path:
    """Write `figure` as PNG to `path` atomically, close it, and return `path`."""
    try:
        with atomic_file(path) as handle:
            figure.savefig(handle, format="png", dpi=DOTS_PER_INCH)
    finally:
        offscreen_pyplot().close(figure)
    return path
