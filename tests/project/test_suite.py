"""What tests/conftest.py says about files of tests is about files that exist."""

from __future__ import annotations

from tests import conftest


def test_files_and_folders_that_are_named_exist() -> None:
    assert all((conftest.TESTS / name).is_file() for name in conftest.LONG)
    assert all((conftest.TESTS / name).exists() for name in conftest.ON_THE_DEVICE)
