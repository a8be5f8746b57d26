"""Whose a folder is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.storage import claim as module
from minicpm_megatron.storage.claim import PLAN, claim


def test_the_same_plan_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "below" / "folder"
    for _ in range(2):
        claim(folder, {"sizes": (1, 2)}, "holds another")
    assert [path.name for path in folder.iterdir()] == [PLAN]
    with pytest.raises(UserError, match="holds another"):
        claim(folder, {"sizes": (1, 3)}, "holds another")


def test_what_is_in_the_way_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("x")
    for place in (tmp_path, tmp_path / "mine"):
        with pytest.raises(UserError, match="exists already"):
            claim(place, {}, "")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("links", [True, False])
def test_many_processes_at_once_agree_on_one_plan(links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten that want one of two plans, those of the plan that was first go on."""
    if not links:
        monkeypatch.setattr(module.os, "link", lambda *places: (_ for _ in ()).throw(OSError(1, "no links")))
    children = []
    for number in range(10):
        child = os.fork()
        if child == 0:
            try:
                claim(tmp_path / "out", {"which": number % 2 if links else 0}, "taken")
                os._exit(0)
            except UserError as error:
                os._exit(2 if "taken" in str(error) else 3)
        children.append(child)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    if links:
        assert sorted((set(statuses[::2]), set(statuses[1::2])), key=sorted) == [{0}, {2}]
        assert [path.name for path in (tmp_path / "out").iterdir()] == [PLAN]
    else:
        assert statuses == [0] * 10
