"""WSD-S at every step against its formula written down a second time, and as one run that is lengthened."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedule import build_schedule
from minicpm_megatron.methods.schedules.wsd_s import WSDS
from minicpm_megatron.recipe import build
from minicpm_megatron.recipe.schema import ScheduleRecipe
from tests.recipe.fields import minimal_fields

W, S = 10, 200
BUDGETS = (50, 100)


@pytest.mark.parametrize("unit", [1, 1000], ids=["steps", "tokens"])
@pytest.mark.parametrize(("share", "floor"), [(0.1, 0.1), (0.25, 0.02)])
def test_at_every_step(share: float, floor: float, unit: int) -> None:
    schedule = WSDS(
        total=S * unit,
        warmup=W * unit,
        unit="steps" if unit == 1 else "tokens",
        budgets=tuple(budget * unit for budget in BUDGETS),
        decay_share=share,
        min_lr_ratio=floor,
    )
    for s in range(1, S + 1):
        budget = 50 if s <= 50 else 100 if s <= 100 else 200
        done = (s - (budget - share * budget)) / (share * budget)
        # reciprocals: 1 at the peak, 1 / floor at the end, a straight line between
        reciprocal = W / s if s < W else 1.0 if done <= 0 else 1 + done * (1 / floor - 1)
        assert 1 / schedule.factor(s * unit) == pytest.approx(reciprocal, rel=1e-9), s
    assert schedule.factor(51 * unit) == schedule.factor(101 * unit) == 1.0  # the full rate again, without a warmup
    assert [schedule.factor(budget * unit) for budget in (50, 100, 200, 999)] == pytest.approx([floor] * 4)
    assert schedule.decay_start == pytest.approx((1 - share) * S * unit)


def test_a_finished_run_goes_on_from_its_decayed_checkpoint() -> None:
    finished = build(minimal_fields(schedule={"shape": "wsd-s", "total": 100, "warmup": 10}))
    options = {"budgets": [finished.schedule.total]}
    longer = build(minimal_fields(schedule={"shape": "wsd-s", "total": 300, "warmup": 10, "options": options}))
    first, second = build_schedule(finished), build_schedule(longer)
    assert [first.factor(s) for s in range(1, 101)] == [second.factor(s) for s in range(1, 101)]
    assert (second.factor(100), second.factor(101)) == (pytest.approx(0.1), 1.0)


def test_from_a_recipe() -> None:
    recipe = ScheduleRecipe(
        shape="wsd-s", total=200, warmup=10, min_lr_ratio=0.02, options={"budgets": [50, 100], "decay_share": 0.25}
    )
    expected = WSDS(total=200, warmup=10, budgets=(50, 100), decay_share=0.25, min_lr_ratio=0.02)
    assert build_schedule(recipe) == expected
    assert expected.describe(0.01) == (
        "WSD-S: 10 steps of warmup, decays over 0.25 of what comes before 50 and 100 and 200;"
        " ends after 200 steps at 0.02 of the rate, which is 0.0002"
    )
    assert [mark for mark in expected.landmarks() if "decay 2" in mark[0]] == [
        ("decay 2 begins", 75),
        ("decay 2 ends", 100),
    ]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"options": {"budgets": [95]}},
            "schedule.options.budgets: the decay that ends at 100 would begin at 90, before 95",
        ),
        (
            {"options": {"budgets": [50, 40]}},
            "schedule.options.budgets: the decay that ends at 40 would begin at 36, before",
        ),
        ({"options": {"budgets": [100]}}, "schedule.options.budgets: the decay that ends at 100 "),
        ({"options": {"budgets": [11]}}, "would begin at 9.9, before 10, where the warmup"),
        ({"options": {"budgets": 50}}, "schedule.options.budgets: 50 is refused, it must be a list"),
        ({"options": {"budgets": [0.5]}}, "schedule.options.budgets.0: 0.5 is refused, it must be a whole number"),
        ({"options": {"decay_share": 1.0}}, "schedule.options.decay_share: 1.0 is refused, it must be less than 1"),
        ({"options": {"decayshare": 0.1}}, r"schedule.options.decayshare; did you mean schedule.options.decay_share\?"),
        ({"options": [1]}, r"schedule.options: \[1\] is refused, it must be a mapping"),
        ({"min_lr_ratio": 0.0}, "schedule.min_lr_ratio: .* that of 0 is infinite; give a floor above 0"),
        (
            {"decay": 10},
            "schedule.decay: 10 is given but the schedule wsd-s has no use for it; set schedule.decay=null",
        ),
    ],
)
def test_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(minimal_fields(schedule={"shape": "wsd-s", "total": 100, "warmup": 10} | changes))
