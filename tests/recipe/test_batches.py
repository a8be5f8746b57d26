"""The closed form of steps, samples and tokens against a walk over the steps."""

from __future__ import annotations

import pytest

from minicpm_megatron.recipe import BatchPlan, build
from tests.recipe.fields import minimal_fields

GROWTHS = {
    "none": [],
    "one": [(1000, 16)],
    "on a step's edge": [(512 * 3, 16)],
    "two": [(1000, 16), (5000, 32)],
    "two inside one step": [(600, 16), (700, 32)],
    "before the first step ends": [(1, 16)],
}


@pytest.mark.parametrize("unit", ["steps", "tokens"])
@pytest.mark.parametrize("growths", GROWTHS.values(), ids=GROWTHS)
def test_against_a_walk(growths: list[tuple[int, int]], unit: str) -> None:
    growth = [{"after_tokens": after, "global_batch_size": size} for after, size in growths]
    total = 40 if unit == "steps" else 20_000
    schedule = {"shape": "constant", "total": total, "unit": unit}
    plan = BatchPlan(build(minimal_fields(training__batch_growth=growth, schedule=schedule)))
    tokens = samples = step = 0
    while (step if unit == "steps" else tokens) < total:
        size = max([8, *(size for after, size in growths if tokens >= after)])
        assert (plan.global_batch_size(step), plan.samples(step), plan.tokens(step)) == (size, samples, tokens)
        step, samples, tokens = step + 1, samples + size, tokens + size * 64
        assert plan.position(step - 1) == (step if unit == "steps" else tokens)
    assert plan.total_steps() == step


@pytest.mark.parametrize("unit", ["steps", "tokens"])
def test_rows_grow_with_the_first_step_that_begins_at_or_after(unit: str) -> None:
    scale = 1 if unit == "steps" else 512
    parts = [
        {"until": 3 * scale, "sequence_length": 16},
        {"until": 4 * scale + (unit == "tokens"), "sequence_length": 32},
    ]
    schedule = {"shape": "constant", "total": 40 * scale, "unit": unit}
    plan = BatchPlan(build(minimal_fields(data__curriculum=parts, schedule=schedule)))
    lengths = [plan.row_length(step) for step in range(7)]
    assert lengths == [16, 16, 16, 32, *([64] if unit == "steps" else [32]), 64, 64]
