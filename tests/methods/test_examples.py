"""The examples in the docstrings of the laws, and on the page about them."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from types import ModuleType

import pytest

from minicpm_megatron.methods import (
    batch_size_law,
    decay_statistics,
    economics,
    intervals,
    loss_envelope,
    polynomial,
    rate_law,
    scaling_law,
    scaling_law_bootstrap,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "laws.md"


@pytest.mark.parametrize(
    "module",
    [
        batch_size_law,
        decay_statistics,
        economics,
        intervals,
        loss_envelope,
        polynomial,
        rate_law,
        scaling_law,
        scaling_law_bootstrap,
    ],
    ids=lambda module: module.__name__.split(".")[-1],
)
def test_the_examples_in_the_docstrings(module: ModuleType) -> None:
    done = doctest.testmod(module)
    assert done.attempted and not done.failed


def test_the_examples_on_the_page() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0))
    assert runner.tries >= 20 and not runner.failures
