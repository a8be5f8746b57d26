"""Numbers and tables as text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence


def aligned(rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of columns two spaces apart: the first column to the left, the others to the right."""
    cells = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        ).rstrip()
        for row in cells
    ]


def number(value: float | None, digits: int = 3) -> str:
    """For people; what is not finite or not known is a dash.

    >>> number(0.0123456), number(None), number(1e18)
    ('0.0123', '-', '1e+18')
    """
    return "-" if value is None or not math.isfinite(value) else f"{value:.{digits}g}"
