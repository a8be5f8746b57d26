"""A package with entry points, laid out in a folder as an installer does it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest


def install_plugin(
    folder: Path, monkeypatch: pytest.MonkeyPatch, package: str, module: str, entries: Mapping[str, str]
) -> None:
    """Make `package`, a module of that name with the source `module`, importable for the rest of the test.

    Args:
        entries: entry-point group -> its lines, "name = package:object".
    """
    site = folder / package
    info = site / f"{package}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("".join(f"[{group}]\n{line}\n" for group, line in entries.items()))
    (site / f"{package}.py").write_text(module)
    monkeypatch.syspath_prepend(str(site))
