"""The page on recipes knows every key, in the schema's own words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.recipe import PRESETS, Recipe
from minicpm_megatron.recipe.load import known_keys
from minicpm_megatron.recipe.schema import Section
from minicpm_megatron.registry import OPTIMIZERS, SCHEDULES, Registry

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")


def test_every_key_has_its_row() -> None:
    leaves = [key for key in known_keys() if key not in Recipe.model_fields]
    assert [key for key in leaves if f"| `{key}` |" not in PAGE] == []


def test_every_key_is_described_in_the_words_of_the_schema() -> None:
    for section in Section.__subclasses__():
        for name, field in section.model_fields.items():
            if section is not Recipe:
                assert field.description, f"{section.__name__}.{name}"
                assert " ".join(field.description.split()) in PAGE, f"{section.__name__}.{name}"


@pytest.mark.parametrize(("section", "registry"), [("schedule", SCHEDULES), ("optimizer", OPTIMIZERS)])
def test_every_option_of_our_own_entries_is_described_in_its_words(section: str, registry: Registry[Any]) -> None:
    for name in registry.names():
        for key, field in registry.get(name).options.model_fields.items():
            default = json.dumps(field.get_default(call_default_factory=True))
            text = " ".join((field.description or "").split())
            assert f"| `{section}.options.{key}` | `{default}` | `{name}`. {text} |" in PAGE


def test_every_preset_of_ours_is_listed() -> None:
    family = [name for name in PRESETS if f"`{name}`" not in PAGE and f"`-{name.partition('-')[2]}`" not in PAGE]
    assert family == []
