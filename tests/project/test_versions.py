"""The one supported line of versions."""

from __future__ import annotations

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.versions import check_versions


@pytest.mark.parametrize("megatron", ["0.19.0", "0.19.2", "0.19.0rc1"])
def test_supported_versions(megatron: str) -> None:
    check_versions((3, 12), megatron)


def test_the_installed_versions_are_supported() -> None:
    check_versions()


@pytest.mark.parametrize(
    ("python", "megatron", "what"),
    [
        ((3, 11), "0.19.2", "Python 3.11 is not supported"),
        ((3, 13), "0.19.2", "Python 3.13 is not supported"),
        ((3, 12), "0.16.1", "megatron-core 0.16.1 is not supported"),
        ((3, 12), "0.20.0", "megatron-core 0.20.0 is not supported"),
        ((3, 12), "1.19.0", "megatron-core 1.19.0 is not supported"),
    ],
)
def test_others_are_one_clear_line(python: tuple[int, int], megatron: str, what: str) -> None:
    with pytest.raises(UserError) as refusal:
        check_versions(python, megatron)
    assert what in str(refusal.value) and "use Python 3.12 with megatron-core 0.19" in str(refusal.value)
    assert "\n" not in str(refusal.value)
