"""Recipes with any damage, and any value of any key: each is a recipe, or refused with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hypothesis import given
from hypothesis import strategies as st

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import Recipe, load_recipe
from minicpm_megatron.recipe.load import known_keys
from tests.hostile import EDITS, EXAMPLES, Edit, check_line, damaged

RECIPE = Path(__file__).resolve().parents[2] / "examples" / "recipes" / "quickstart.yaml"
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.text(max_size=4) | st.sampled_from([0, -1, 1, 2**31, 0.5, float("inf"), [], {}]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=4,
)


@EXAMPLES
@given(edit=EDITS)
def test_any_damage_of_a_recipe(edit: Edit, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(damaged(RECIPE.read_bytes(), edit))
    try:
        assert isinstance(load_recipe(path), Recipe)
    except UserError as error:
        check_line(error, path)


@EXAMPLES
@given(key=st.sampled_from(sorted(key for key in known_keys() if "*" not in key)), value=VALUES)
def test_any_value_of_any_key(key: str, value: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    fields = yaml.safe_load(RECIPE.read_text())
    *sections, last = key.split(".")
    target = fields
    for section in sections:
        target[section] = target = target[section] if isinstance(target.get(section), dict) else {}
    target[last] = value
    path.write_text(yaml.safe_dump(fields))
    try:
        assert isinstance(load_recipe(path), Recipe)
    except UserError as error:
        check_line(error, path)
