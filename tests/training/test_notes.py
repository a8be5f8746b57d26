"""When a schedule is worth a note."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm_megatron.methods.schedules import build_schedule
from minicpm_megatron.recipe import build
from minicpm_megatron.training.notes import schedule_note
from tests.recipe.fields import minimal_fields


def schedule(**changes: Any) -> Any:
    return build(minimal_fields(schedule={"total": 100, "warmup": 10, "decay": 20, "half_life": 15} | changes)).schedule


@pytest.mark.parametrize(
    ("changes", "noted"),
    [
        ({}, True),
        ({"half_life": 6.1}, True),  # 2^-3.28 = 0.103
        ({"half_life": 6}, False),  # 2^-3.33 = 0.099
        ({"decay": 0}, False),  # a trunk
        ({"min_lr_ratio": 0.5}, False),  # asked for
        ({"min_lr_ratio": 0.05}, True),
        ({"decay_shape": "linear", "half_life": None}, False),
        ({"shape": "constant", "decay": None, "half_life": None}, False),
    ],
)
def test_an_exponential_decay_that_stays_above_a_tenth(changes: dict[str, Any], noted: bool) -> None:
    assert (schedule_note(schedule(**changes)) is not None) == noted


def test_each_remedy_of_the_note_takes_the_decay_below_a_tenth() -> None:
    note = schedule_note(schedule())
    assert note is not None and "schedule.half_life=4 (5 half-lives), or schedule.decay=75" in note
    for remedy in ({"half_life": 4}, {"decay": 75}):
        assert build_schedule(schedule(**remedy)).end_factor == pytest.approx(1 / 32)
