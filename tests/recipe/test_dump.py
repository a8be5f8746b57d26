"""A recipe survives being written, and its hash changes with what decides the numbers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from minicpm_megatron.recipe import build, dump_recipe, load_recipe, recipe_hash
from tests.recipe.fields import minimal_fields

NASTY = [
    "1e-2",
    "no",
    "null",
    "1:30",
    "- a",
    "a: b",
    "#x",
    "中文",
    "'q'",
    "~",
    "1_000",
    "*a",
    "!t",
    " x ",
    "=",
    "2024-01-01",
]


def test_loads_back_equal(tmp_path: Path) -> None:
    fields = minimal_fields(
        data={"train": [{"prefix": text, "weight": 1e-7} for text in NASTY], "sequence_length": 64},
        training__batch_growth=[{"after_tokens": 10**15, "global_batch_size": 16}],
        optimizer={"lr": 1e-5, "betas": [0.9, 0.999], "eps": 1e-16},
        name="1e3",
    )
    recipe = build(fields)
    path = tmp_path / "dumped.yaml"
    path.write_text(dump_recipe(recipe), encoding="utf-8")
    assert load_recipe(path) == recipe
    # a YAML 1.1 reader, which most are, sees the same texts
    assert [source["prefix"] for source in yaml.safe_load(path.read_text())["data"]["train"]] == NASTY


def test_a_hash_outlives_new_keys() -> None:
    """Runs and wind-tunnel folders hold it: a key that came later, and is off, must not change it."""
    assert recipe_hash(build(minimal_fields())) == "557838af598cf9ca18a07d41369f3022a23f901771b6013d175919c406b57580"


@pytest.mark.parametrize(
    "changes",
    [
        {"name": "other"},
        {"logging": {"interval": 1}},
        {"run": {"directory": "elsewhere"}},
        {"data__validation": {"en": "x"}},
        {"data__tokenizer": "x"},
        {"parallel__tensor_model_parallel_size": 2},
        {"training__micro_batch_size": 1},
        {"training__recompute": "full"},
        {"training__stop_after": 3},
        {"deepspeed__zero_stage": 3},
        {"evaluation": {"interval": 5}},
        {"checkpoint": {"interval": 5}},
    ],
    ids=str,
)
def test_hash_ignores_what_leaves_the_losses_alone(changes: dict[str, Any]) -> None:
    assert recipe_hash(build(minimal_fields(**changes))) == recipe_hash(build(minimal_fields()))


@pytest.mark.parametrize(
    "changes",
    [
        {"model__num_layers": 3},
        {"model__embedding_role": "matrix"},
        {"data__train": [{"prefix": "other"}]},
        {"data__sequence_length": 32},
        {"training__global_batch_size": 16},
        {"training__batch_growth": [{"after_tokens": 1, "global_batch_size": 16}]},
        {"training__precision": "fp32"},
        {"training__gradient_clipping": 0.0},
        {"training__z_loss_coeff": 1e-4},
        {"training__seed": 1},
        {"optimizer": {"weight_decay": 0.0}},
        {"schedule__half_life": 6},
        {"schedule": {"shape": "wsd-s", "total": 100, "warmup": 10}},
        {"faults": {"spike": "skip"}},
    ],
    ids=str,
)
def test_hash_sees_what_decides_the_losses(changes: dict[str, Any]) -> None:
    assert recipe_hash(build(minimal_fields(**changes))) != recipe_hash(build(minimal_fields()))


def test_options_of_a_schedule_count_with_their_defaults() -> None:
    short = {"shape": "wsd-s", "total": 100, "warmup": 10}
    spelled = short | {"options": {"decay_share": 0.1, "budgets": []}}
    first, second, other = (
        build(minimal_fields(schedule=schedule))
        for schedule in (short, spelled, short | {"options": {"decay_share": 0.2}})
    )
    assert first.schedule.options == {"budgets": [], "decay_share": 0.1}  # a resolved recipe has every default
    assert recipe_hash(first) == recipe_hash(second) != recipe_hash(other)


def test_hash_does_not_depend_on_how_the_recipe_was_written() -> None:
    spelled = minimal_fields(preset=None, model=build(minimal_fields()).model.model_dump())
    assert recipe_hash(build(spelled)) == recipe_hash(build(minimal_fields()))
    assert len(recipe_hash(build(spelled))) == 64
