"""The power schedule at every step against equations 7 and 8 of arXiv 2408.13359, with a batch that grows."""

from __future__ import annotations

from typing import Any

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedule import build_schedule
from minicpm_megatron.methods.schedules.power import Power
from minicpm_megatron.recipe import build
from tests.recipe.fields import minimal_fields

LENGTH = 64  # tokens of a sequence


def fields(**changes: Any) -> dict[str, Any]:
    """200 steps of 8 sequences with 20 of warmup, and a last fifth of decay; the learning rate is capped at first."""
    schedule = {
        "shape": "power",
        "unit": "tokens",
        "warmup": 20 * 8 * LENGTH,
        "total": 200 * 8 * LENGTH,
        "decay": 40 * 8 * LENGTH,
        "decay_shape": "linear",
        "min_lr_ratio": 0.0,
        "options": {"amplitude": 13.0},
    }
    return minimal_fields(optimizer={"lr": 0.01}, schedule=schedule | changes)


@pytest.mark.parametrize("growth", [None, 50, 170], ids=["one batch", "grows", "grows in the decay"])
def test_at_every_step(growth: int | None) -> None:
    recipe = fields()
    if growth is not None:
        recipe["training"]["batch_growth"] = [{"after_tokens": growth * 8 * LENGTH, "global_batch_size": 16}]
    schedule = build_schedule(build(recipe))
    warmup, total, decay = (count * 8 * LENGTH for count in (20, 200, 40))

    def rate(n: int) -> float:
        sequences = 16 if growth is not None and n > growth * 8 * LENGTH else 8
        return min(0.01, sequences * LENGTH / 4096 * 13.0 * n**-0.51)

    n, capped, fallen = 0, 0, 0
    while n < total:
        n += (16 if growth is not None and n >= growth * 8 * LENGTH else 8) * LENGTH
        if n < warmup:
            expected = n / warmup * rate(warmup)
        elif n <= total - decay:
            expected = rate(n)
            capped, fallen = capped + (expected == 0.01), fallen + (expected < 0.01)
        else:
            expected = rate(total - decay) * (1 - (min(n, total) - (total - decay)) / decay)
        assert 0.01 * schedule.factor(n) == pytest.approx(expected, rel=1e-12, abs=1e-15), n
    assert capped and fallen  # both arms of the minimum were met


def test_the_learning_rate_that_the_paper_predicts() -> None:
    """Section 3.2: 10T tokens in batches of 1,024 sequences have 0.0011, with the a and b of equation 5."""
    tokens = 1024 * 4096
    schedule = Power(
        total=10**13, unit="tokens", decay=0, lr=0.02, batches=((0, tokens),), amplitude=4.6, exponent=-0.51
    )
    assert f"{0.02 * schedule.factor(10**13):.4f}" == "0.0011"


def test_defaults_are_the_papers() -> None:
    schedule = build_schedule(build(fields(options=None)))
    assert isinstance(schedule, Power)
    assert (schedule.amplitude, schedule.exponent) == (4.0, -0.51)


def test_a_batch_of_as_many_tokens_has_the_same_rate_whatever_its_sequences() -> None:
    long, short = fields(), fields()
    short["data"]["sequence_length"], short["training"]["global_batch_size"] = 32, 16
    assert build_schedule(build(long)) == build_schedule(build(short))


def test_a_warmup_rises_to_where_the_power_begins() -> None:
    low = build_schedule(build(fields(options={"amplitude": 0.1})))
    assert low.peak == pytest.approx(8 * 64 / 4096 * 0.1 * (20 * 512) ** -0.51 / 0.01)
    assert low.factor(10 * 512) == pytest.approx(low.peak / 2)
    assert build_schedule(build(fields(warmup=0))).factor(512) == 1.0


def test_description() -> None:
    line = build_schedule(build(fields())).describe(0.01)
    assert line == (
        "power: 10,240 tokens of warmup, batch / 4,096 x 13 n^-0.51, at most 0.01, to 81,920, linear decay over 20,480;"
        " ends after 102,400 tokens at 0 of the rate, which is 0"
    )


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"unit": "steps"}, "schedule.unit: the power schedule counts tokens; set schedule.unit=tokens"),
        ({"decay": None}, "schedule.decay: the schedule power needs the length of its decay; give about 10 %"),
        ({"half_life": 5.0}, "schedule.half_life: 5.0 is given but the schedule power with linear decay has no use"),
        (
            {"options": {"exponent": 0.5}},
            "schedule.options.exponent: 0.5 is refused, it must be less than or equal to 0",
        ),
        ({"options": {"amplitude": 0}}, "schedule.options.amplitude: 0 is refused, it must be greater than 0"),
        ({"options": {"exponnt": 0}}, r"schedule.options.exponnt; did you mean schedule.options.exponent\?"),
    ],
)
def test_refused(changes: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        build(fields(**changes))


def test_the_section_alone_is_not_enough() -> None:
    with pytest.raises(UserError, match="schedule.shape: the power schedule depends on optimizer.lr and the batch"):
        build_schedule(build(fields()).schedule)
