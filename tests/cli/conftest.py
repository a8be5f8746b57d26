from __future__ import annotations

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def here(sound: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the module's `sound` folder to be spoilt, as the current folder."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    (tmp_path / "a-file").write_text("x")
    monkeypatch.chdir(tmp_path)
    return tmp_path
