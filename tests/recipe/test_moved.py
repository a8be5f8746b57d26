"""Where the files that a moved run's recipe names are now."""

from __future__ import annotations

from pathlib import Path

import pytest

from minicpm_megatron.recipe.moved import moved_path


@pytest.mark.parametrize(
    ("recorded", "found"),
    [("runs/a/tokenizer", "/new/b/tokenizer"), ("runs/ab/tokenizer", None), ("/runs/a/tokenizer", None)],
)
def test_what_was_inside_a_run_is_inside_it_still(recorded: str, found: str | None) -> None:
    assert moved_path(Path(recorded), Path("runs/a"), Path("/new/b")) == (found and Path(found))
