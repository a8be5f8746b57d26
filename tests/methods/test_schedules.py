"""Every schedule at every step against a closed form written down a second time, and against other libraries."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.decay_shapes import as_decay_shape
from minicpm_megatron.methods.schedules import (
    WSD,
    Constant,
    Cosine,
    CosineLoop,
    DecaySettings,
    Schedule,
    branch_schedule,
    build_schedule,
)
from minicpm_megatron.recipe.schema import ScheduleRecipe
from minicpm_megatron.registry import DECAY_SHAPES

W, T, S = 10, 60, 100  # warmup, end of the stable stage, end of the run
FLOOR = 0.1


def halves(r: float) -> float:
    return math.exp(-math.log(2) * r * (S - T) / 8)


CLOSED_FORMS: dict[str, Callable[[float], float]] = {
    "exponential": halves,
    "linear": lambda r: 1 - 0.9 * r,
    "cosine": lambda r: 0.55 + 0.45 * math.cos(math.pi * r),
    "1-sqrt": lambda r: 1 - 0.9 * r**0.5,
    "megatron-exponential": lambda r: 0.1 + 0.9 * (2 ** (1 - r) - 1),
}


def wsd(shape: str, **changes: float) -> WSD:
    half_life = 8 if shape == "exponential" else None
    return WSD(**({"total": S, "warmup": W, "decay": S - T, "decay_shape": shape, "half_life": half_life} | changes))


@pytest.mark.parametrize("shape", CLOSED_FORMS)
def test_wsd_at_every_step(shape: str) -> None:
    schedule = wsd(shape)
    for s in range(1, S + 1):
        expected = s / 10 if s < W else 1.0 if s <= T else CLOSED_FORMS[shape]((s - T) / (S - T))
        assert schedule.factor(s) == pytest.approx(expected, rel=1e-12), s
    assert schedule.factor(S + 50) == schedule.end_factor == pytest.approx(CLOSED_FORMS[shape](1.0))


def test_exponential_halves_every_half_life_whatever_the_decay_length() -> None:
    for decay, half_life in itertools.product((10, 20, 40), (5, 8, 10)):
        schedule = WSD(total=60 + decay, decay=decay, half_life=half_life)
        for s in range(60, 60 + decay - half_life + 1):
            assert schedule.factor(s + half_life) == pytest.approx(schedule.factor(s) / 2, rel=1e-12)


def test_the_published_decay_needs_16610_steps_to_reach_ten_percent() -> None:
    schedule = WSD(total=100_000, decay=25_000, half_life=5_000)
    assert schedule.factor(75_000 + 16_609) > 0.1 > schedule.factor(75_000 + 16_610)


def test_exponential_with_a_floor_of_its_own_stops_there() -> None:
    schedule = wsd("exponential", min_lr_ratio=0.25)
    assert schedule.factor(T + 8) == pytest.approx(0.5)
    assert [schedule.factor(s) for s in (T + 16, T + 17, S)] == pytest.approx([0.25, 0.25, 0.25])


def test_linear_decay_in_exact_fractions() -> None:
    schedule = WSD(total=110, decay=10, decay_shape="linear", min_lr_ratio=0.0)
    assert [Fraction(schedule.factor(s)).limit_denominator(1000) for s in range(101, 111)] == [
        Fraction(10 - step, 10) for step in range(1, 11)
    ]


@pytest.mark.parametrize("kind", [Cosine, CosineLoop])
def test_cosine_at_every_step(kind: type[CosineLoop]) -> None:
    schedule = kind(total=200, warmup=W, period=70)
    for s in range(1, 201):
        wave = 0.9 * (1 + math.cos(math.pi * s / 70)) / 2 + 0.1
        expected = s / W if s < W else wave if kind is CosineLoop or s < 70 else 0.1
        assert schedule.factor(s) == pytest.approx(expected, rel=1e-12), s
    assert schedule.factor(140) == pytest.approx(1.0 if kind is CosineLoop else 0.1)


@pytest.mark.parametrize(("kind", "steps"), [(CosineLoop, 150), (Cosine, 70)])
def test_cosine_equals_torch(kind: type[CosineLoop], steps: int) -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.02)
    peer = CosineAnnealingLR(optimizer, T_max=70, eta_min=0.002)
    schedule = kind(total=200, period=70)
    for s in range(1, steps + 1):
        optimizer.step()
        peer.step()
        assert 0.02 * schedule.factor(s) == pytest.approx(peer.get_last_lr()[0], rel=1e-9), s


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("shape", "theirs"),
    [("linear", "linear"), ("cosine", "cosine"), ("1-sqrt", "minus_sqrt"), ("megatron-exponential", "exponential")],
)
def test_wsd_equals_megatron(shape: str, theirs: str) -> None:
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    peer = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=1.0,
        min_lr=FLOOR,
        lr_warmup_steps=W,
        lr_decay_steps=S,
        lr_decay_style="WSD",
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=S,
        wd_incr_style="constant",
        wsd_decay_steps=S - T,
        lr_wsd_decay_style=theirs,
    )
    schedule = wsd(shape)
    for s in range(1, S + 1):
        peer.step(1)
        assert schedule.factor(s) == pytest.approx(peer.get_lr({}), rel=1e-12), s


def test_constant_and_warmup() -> None:
    assert [Constant(warmup=4).factor(s) for s in (1, 2, 3, 4, 5, 10**9)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert Constant().factor(1) == 1.0


@pytest.mark.parametrize("floor", [None, 0.0, 0.3])
@pytest.mark.parametrize("shape", DECAY_SHAPES.names())
def test_contract_of_every_registered_shape(shape: str, floor: float | None) -> None:
    half_life = 8 if shape == "exponential" else None
    schedule = WSD(total=S, decay=S - T, decay_shape=shape, half_life=half_life, min_lr_ratio=floor)
    shape_of = DECAY_SHAPES.get(shape)
    assert shape_of(1e-12, schedule.settings) == pytest.approx(1.0, abs=1e-5)
    values = [shape_of(r / 1000, schedule.settings) for r in range(1, 1001)]
    assert all(later <= earlier for earlier, later in itertools.pairwise([1.0, *values]))
    assert all(0 < value <= 1 for value in values[:-1])
    own = 0.0 if shape == "exponential" else 0.1
    end = max(0.5**5, own if floor is None else floor) if shape == "exponential" else own if floor is None else floor
    assert values[-1] == pytest.approx(end, abs=1e-12)


def test_in_tokens_the_curve_stays_where_it_is_when_the_batch_doubles() -> None:
    in_tokens = WSD(total=100_000, warmup=8_000, decay=40_000, half_life=10_000, unit="tokens")
    tokens, batch = 0, 1_000
    while tokens < 100_000:
        batch = 2_000 if tokens >= 30_000 else 1_000
        tokens += batch
        expected = tokens / 8_000 if tokens < 8_000 else 1.0 if tokens <= 60_000 else 2 ** -((tokens - 60_000) / 10_000)
        assert in_tokens.factor(tokens) == pytest.approx(expected, rel=1e-12)
    assert in_tokens.end_factor == pytest.approx(1 / 16)


def test_branch_leaves_at_a_checkpoint_and_the_trunk_goes_on() -> None:
    trunk = WSD(total=1000, warmup=10, decay=0)
    branch = branch_schedule(trunk, at=300, decay=40, half_life=8)
    assert [branch.factor(s) for s in range(1, 301)] == [trunk.factor(s) for s in range(1, 301)]
    assert [branch.factor(300 + s) for s in range(1, 41)] == pytest.approx([0.5 ** (s / 8) for s in range(1, 41)])
    other = branch_schedule(trunk, at=300, decay=100, decay_shape="linear")
    assert (other.total, other.end_factor, trunk.factor(340)) == (400, pytest.approx(0.1), 1.0)
    assert branch_schedule(Constant(warmup=10), at=50, decay=5, half_life=1).factor(55) == pytest.approx(1 / 32)
    in_tokens = branch_schedule(WSD(total=9e9, decay=0, unit="tokens"), at=4e9, decay=1e9, half_life=2e8)
    assert (in_tokens.unit, in_tokens.end_factor) == ("tokens", pytest.approx(1 / 32))


@pytest.mark.parametrize(
    ("trunk", "at", "line"),
    [
        (
            WSD(total=100, warmup=10, decay=20, half_life=5),
            81,
            "position 81 is not in the trunk's stable stage, 10 to 80",
        ),
        (WSD(total=100, warmup=10, decay=20, half_life=5), 9, "position 9 is not in"),
        (Cosine(total=100, period=100), 50, "Cosine.* has no stable stage to leave"),
    ],
)
def test_branch_from_where_there_is_no_stable_stage(trunk: Schedule, at: int, line: str) -> None:
    with pytest.raises(UserError, match=line):
        branch_schedule(trunk, at=at, decay=10, half_life=2)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"total": 0, "decay": 0}, "schedule.total: 0 is not a length"),
        ({"total": 10, "decay": 11, "half_life": 1}, "schedule.decay: 11 does not fit"),
        ({"total": 10, "warmup": 11, "decay": 0}, "schedule.warmup: 11 does not fit"),
        ({"total": 10, "decay": 5}, "schedule.half_life: exponential decay needs its half-life"),
        ({"total": 10, "decay": 5, "decay_shape": "cosin"}, "unknown decay shape 'cosin'; did you mean cosine"),
    ],
)
def test_refused_settings(settings: dict[str, float], line: str) -> None:
    with pytest.raises(UserError, match=line):
        WSD(**settings)


@pytest.mark.parametrize(
    ("shape", "line"),
    [
        (lambda r, settings: r, "'bad' is 0.02 at progress 0.02, which is not between 0 and 0.01"),
        (lambda r, settings: 1 - 2 * r, "'bad' is -0.02"),
        (lambda r, settings: math.nan, "'bad' is nan"),
        (lambda r, settings: None, "'bad' is None"),
        (lambda r: r, "'bad' fails at progress 0.01: TypeError"),
        (lambda r, settings: 1 / 0, "'bad' fails at progress 0.01: ZeroDivisionError"),
    ],
)
def test_a_shape_that_is_no_decay_is_refused(monkeypatch: pytest.MonkeyPatch, shape: DecaySettings, line: str) -> None:
    monkeypatch.setitem(DECAY_SHAPES._entries, "bad", as_decay_shape(shape))
    with pytest.raises(UserError, match=f"schedule.decay_shape: {line}"):
        WSD(total=10, decay=5, decay_shape="bad")


@pytest.mark.parametrize(
    ("fields", "schedule"),
    [
        ({"total": 9, "decay": 4, "half_life": 2}, WSD(total=9, decay=4, half_life=2)),
        ({"shape": "cosine", "total": 9}, Cosine(total=9, period=9)),
        (
            {"shape": "cosine_loop", "total": 9, "period": 3, "min_lr_ratio": 0.0, "warmup": 2},
            CosineLoop(total=9, period=3, min_lr_ratio=0.0, warmup=2),
        ),
        ({"shape": "constant", "total": 9, "unit": "tokens"}, Constant(total=9, unit="tokens")),
    ],
)
def test_from_a_recipe(fields: dict[str, object], schedule: Schedule) -> None:
    assert build_schedule(ScheduleRecipe(**fields)) == schedule


def test_description_names_the_rate_at_the_end() -> None:
    text = wsd("exponential").describe(0.01)
    assert text == (
        "WSD: 10 steps of warmup, stable to 60, exponential decay over 40 (half-life 8);"
        " ends after 100 steps at 0.03125 of the rate, which is 0.000313"
    )
    assert "minimum at 70" in Cosine(total=200, period=70).describe()
    assert "no decay" in WSD(total=10, decay=0).describe()
    for schedule in (wsd("linear"), Cosine(total=200, warmup=3, period=70), Constant(total=5)):
        positions = [position for _, position in schedule.landmarks()]
        assert positions == sorted(positions)
        assert positions[-1] == schedule.total
