"""The examples in the docstrings of the laws, and on the page about them."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

MODULES = (
    "batch_size_law",
    "decay_statistics",
    "economics",
    "intervals",
    "loss_envelope",
    "polynomial",
    "rate_law",
    "scaling_law",
    "scaling_law_bootstrap",
    "tokens_per_size",
)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "laws.md"


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_in_the_docstrings(name: str) -> None:
    done = doctest.testmod(importlib.import_module(f"minicpm_megatron.methods.{name}"))
    assert done.attempted and not done.failed


def test_the_examples_on_the_page() -> None:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    runner = doctest.DocTestRunner()
    runner.run(doctest.DocTestParser().get_doctest("\n".join(blocks), {}, PAGE.name, str(PAGE), 0))
    assert runner.tries >= 20 and not runner.failures
