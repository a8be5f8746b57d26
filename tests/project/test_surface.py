"""The library's surface: what `dir` lists, and what `help` says of each name."""

from __future__ import annotations

import importlib
import inspect
import pydoc
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from megatron.core.transformer.transformer_config import TransformerConfig

import minicpm_megatron

ROOT = Path(__file__).resolve().parents[2]
SURFACE = [name for name in minicpm_megatron.__all__ if name != "__version__"]


def parameters_of(value: Any) -> list[str]:
    """Names of the arguments that a caller may give; of a config those that Megatron-Core's has not."""
    if value is minicpm_megatron.MiniCPMConfig:
        inherited = {field.name for field in fields(TransformerConfig)}
        return [field.name for field in fields(value) if field.name not in inherited]
    signature = inspect.signature(getattr(value, "_function", value))
    return [
        name for name, each in signature.parameters.items() if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
    ]


def test_dir_lists_the_surface():
    assert set(minicpm_megatron.__all__) <= set(dir(minicpm_megatron))


@pytest.mark.parametrize("name", SURFACE)
def test_help_says_the_arguments(name):
    value = getattr(minicpm_megatron, name)
    text = pydoc.render_doc(value, renderer=pydoc.plaintext)
    if not callable(value):  # the mapping of presets
        assert "mapping" in text
        return
    for parameter in parameters_of(value):
        assert re.search(rf"^[ |]*(\w+, )*{parameter}(, \w+)*: ", text, re.M) or name.endswith("stack_spec"), parameter


def test_the_api_page_shows_the_whole_surface():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (\S+)$", page, re.M)
    assert {name.rpartition(".")[2] for name in shown} == {*SURFACE} - {"presets"} | {"PRESETS"}
    for name in shown:
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert found is getattr(minicpm_megatron, "presets" if attribute == "PRESETS" else attribute)
