"""What every picture must have, read from the figures that a test draws."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def drawn() -> Iterator[list[Any]]:
    """The figures that are saved meanwhile; each of them is checked.

    Raises:
        AssertionError: axes without a label, a legend on data, two entries of one name, or a kind of line without one.
    """
    from matplotlib.figure import Figure

    figures: list[Any] = []
    save = Figure.savefig

    def record(figure: Any, *args: Any, **keywords: Any) -> None:
        save(figure, *args, **keywords)
        check(figure)
        figures.append(figure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", record)
        yield figures


def legend_of(axis: Any) -> list[str]:
    """The entries of an axes' legend."""
    legend = axis.get_legend()
    return [] if legend is None else [text.get_text() for text in legend.get_texts()]


def check(figure: Any) -> None:
    """See `drawn`."""
    for axis in figure.axes:
        if not axis.get_visible():
            continue
        assert axis.has_data() or axis.images or axis.get_label() == "<colorbar>", "an empty panel"
        assert axis.get_ylabel() or axis.get_title() or not _first_column(axis), "an axis without a word"
        names = legend_of(axis)
        assert len(names) == len(set(names)), names
        legend = axis.get_legend()
        if legend is not None and not legend.get_frame_on():
            box, data = legend.get_window_extent(), axis.get_window_extent()
            assert box.x0 >= data.x1 - 1 or box.y1 <= data.y0 + 1, "a legend on the data"
        assert not axis.xaxis_inverted(), "an axis that runs backwards"
    bottom = [axis for axis in figure.axes if axis.get_label() != "<colorbar>" and _last_row(axis)]
    assert all(axis.get_xlabel() for axis in bottom), "an x axis without a word"


def _first_column(axis: Any) -> bool:
    spec = axis.get_subplotspec()
    return spec is not None and spec.is_first_col()


def _last_row(axis: Any) -> bool:
    spec = axis.get_subplotspec()
    return spec is not None and spec.is_last_row() and axis.get_visible()
