"""Which Python goes with which megatron-core."""

from __future__ import annotations

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.versions import check_versions


@pytest.mark.parametrize(
    ("python", "megatron"), [((3, 11), "0.16.1"), ((3, 12), "0.17.0"), ((3, 12), "0.19.2"), ((3, 12), "0.18.0rc1")]
)
def test_supported_pairs(python, megatron):
    check_versions(python, megatron)


def test_the_installed_pair_is_supported():
    check_versions()


@pytest.mark.parametrize(
    ("python", "megatron", "what"),
    [
        ((3, 10), "0.16.1", "Python 3.10 is not supported"),
        ((3, 13), "0.19.2", "Python 3.13 is not supported"),
        ((3, 11), "0.15.0", "megatron-core 0.15.0 is not supported on Python 3.11"),
        ((3, 11), "0.17.0", "megatron-core 0.17.0 is not supported on Python 3.11"),
        ((3, 12), "0.16.1", "megatron-core 0.16.1 is not supported on Python 3.12"),
        ((3, 12), "1.0.0", "megatron-core 1.0.0 is not supported"),
    ],
)
def test_others_are_one_clear_line(python, megatron, what):
    with pytest.raises(UserError) as refusal:
        check_versions(python, megatron)
    assert what in str(refusal.value) and "use Python 3.11 with megatron-core 0.16" in str(refusal.value)
    assert "\n" not in str(refusal.value)
