"""The paths that a run's recipe names, once the run was moved or copied."""

from __future__ import annotations

from pathlib import Path


def moved_path(recorded: Path, before: Path, here: Path) -> Path | None:
    """Where a file of a moved run would be now: at the same place inside the run; None where it was outside.

    Args:
        recorded: as the recipe names it.
        before, here: where the run was, as its recipe names that, and is.
    """
    return here / recorded.relative_to(before) if recorded.is_relative_to(before) else None
