"""Renew the golden files: `python -m tests.golden [curves|recipes]`."""

from __future__ import annotations

import os
import sys

from tests.device import VISIBLE
from tests.golden import files


def main() -> None:
    """Write the files of one kind, or of both."""
    kinds = sys.argv[1:] or ["curves", "recipes"]
    if "curves" in kinds:
        os.environ[VISIBLE] = ""  # as in tests/conftest.py
        for name, case in files.CURVES.items():
            files.write_curve(name, files.curve(case))
            print(files.curve_path(name))
    if "recipes" in kinds:
        for path in set((files.FOLDER / "recipes").rglob("*.yaml")) - set(map(files.recipe_path, files.SHIPPED)):
            path.unlink()  # of a recipe that is shipped no more
        for shipped in files.SHIPPED:
            path = files.recipe_path(shipped)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(files.resolved(shipped), encoding="utf-8")
            print(path)


if __name__ == "__main__":
    main()
