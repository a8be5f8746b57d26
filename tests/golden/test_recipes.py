"""What every shipped recipe stands for is committed: a default that changes shows as a diff."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden import files


@pytest.mark.parametrize("shipped", files.SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_recipe_resolves_as_committed(shipped: Path) -> None:
    lines = files.difference(shipped)
    assert not lines, f"\n{lines}\nif that is meant: {files.RENEW} recipes"


def test_no_file_is_left_of_a_recipe_that_is_shipped_no_more() -> None:
    assert {files.recipe_path(path) for path in files.SHIPPED} == set((files.FOLDER / "recipes").rglob("*.yaml"))


def test_a_difference_is_shown_as_a_diff(monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = files.SHIPPED[0]
    text = files.resolved(shipped)
    monkeypatch.setattr(files, "resolved", lambda path: text.replace("seed: ", "seed: 9"))
    changed = [line for line in files.difference(shipped).splitlines()[2:] if line[0] in "+-"]
    (line,) = [line for line in text.splitlines() if "seed: " in line]
    assert changed == [f"-{line}", f"+{line.replace('seed: ', 'seed: 9')}"]
