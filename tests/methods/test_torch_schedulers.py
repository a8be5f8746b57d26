"""The torch schedulers against the pure curves, torch's habits and DeepSpeed's interface."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from minicpm_megatron.errors import UserError
from minicpm_megatron.methods.schedules import WSD
from minicpm_megatron.methods.torch_schedulers import (
    ConstantScheduler,
    CosineLoopScheduler,
    CosineScheduler,
    ScheduleLR,
    WSDScheduler,
)
from tests.device import put

RATES = (0.01, 0.0025, 0.005)  # base rate and the muP groups' shares of it
TRUNK = {"total": 60, "warmup": 5, "decay": 20, "half_life": 4}


def make_optimizer() -> torch.optim.AdamW:
    torch.manual_seed(0)
    groups = [{"params": [torch.nn.Parameter(put(torch.randn(3)))], "lr": rate} for rate in RATES]
    return torch.optim.AdamW(groups)


def train(optimizer: torch.optim.Optimizer, scheduler: ScheduleLR, steps: int, **step: Any) -> list[list[float]]:
    used = []
    for _ in range(steps):
        used.append([group["lr"] for group in optimizer.param_groups])
        for group in optimizer.param_groups:
            group["params"][0].grad = put(torch.ones(3))
        optimizer.step()
        scheduler.step(**step)
    return used


@pytest.mark.parametrize(
    ("make", "closed_form"),
    [
        (
            lambda o: WSDScheduler(o, **TRUNK),
            lambda s: s / 5 if s < 5 else 1.0 if s <= 40 else 0.5 ** ((min(s, 60) - 40) / 4),
        ),
        (
            lambda o: CosineScheduler(o, period=30),
            lambda s: 0.45 * (1 + math.cos(math.pi * min(s, 30) / 30)) + 0.1,
        ),
        (
            lambda o: CosineLoopScheduler(o, period=30),
            lambda s: 0.45 * (1 + math.cos(math.pi * s / 30)) + 0.1,
        ),
        (lambda o: ConstantScheduler(o, warmup=4), lambda s: min(1.0, s / 4)),
    ],
    ids=["wsd", "cosine", "cosine_loop", "constant"],
)
@pytest.mark.filterwarnings("error")
def test_rates_that_the_optimizer_really_uses(make: Any, closed_form: Any) -> None:
    optimizer = make_optimizer()
    scheduler = make(optimizer)
    used = train(optimizer, scheduler, 70)
    for s, rates in enumerate(used, start=1):
        assert rates == pytest.approx([rate * closed_form(s) for rate in RATES], rel=1e-12), s
        assert [rate / rates[0] for rate in rates] == pytest.approx([1.0, 0.25, 0.5], rel=1e-12)
    assert scheduler.get_last_lr() == [group["lr"] for group in optimizer.param_groups]


def test_interrupted_run_goes_on_in_every_bit() -> None:
    whole = make_optimizer()
    expected = train(whole, WSDScheduler(whole, **TRUNK), 60)
    first = make_optimizer()
    scheduler = WSDScheduler(first, **TRUNK)
    used = train(first, scheduler, 47)
    saved = json.loads(json.dumps(scheduler.state_dict()))
    weights = [group["params"][0].detach().clone() for group in first.param_groups]

    second = make_optimizer()
    resumed = WSDScheduler(second, **TRUNK)
    second.load_state_dict(first.state_dict())
    for group, weight in zip(second.param_groups, weights, strict=True):
        group["params"][0].data.copy_(weight)
    resumed.load_state_dict(saved)
    used += train(second, resumed, 13)
    assert used == expected
    for ours, theirs in zip(second.param_groups, whole.param_groups, strict=True):
        assert torch.equal(ours["params"][0], theirs["params"][0])


def test_last_epoch_resumes_as_in_torch() -> None:
    whole = make_optimizer()
    expected = train(whole, WSDScheduler(whole, **TRUNK), 60)
    optimizer = make_optimizer()
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    assert train(optimizer, WSDScheduler(optimizer, **TRUNK, last_epoch=46), 13) == expected[47:]


def test_rates_of_a_loaded_optimizer_do_not_survive_its_scheduler() -> None:
    """A checkpoint saved at another base rate resumes at the rates this run asks for."""
    old, new = make_optimizer(), make_optimizer()
    for group in old.param_groups:
        group["lr"] *= 7
    saved = WSDScheduler(old, **TRUNK)
    train(old, saved, 20)
    scheduler = WSDScheduler(new, **TRUNK)
    new.load_state_dict(old.state_dict())
    scheduler.load_state_dict(saved.state_dict())
    assert [group["lr"] for group in new.param_groups] == pytest.approx(RATES)
    assert [group["initial_lr"] for group in new.param_groups] == pytest.approx(RATES)


def test_branch_takes_over_the_position_of_its_trunk() -> None:
    optimizer = make_optimizer()
    trunk = WSDScheduler(optimizer, total=1000, warmup=5, decay=0)
    train(optimizer, trunk, 40)
    branch = WSDScheduler(make_optimizer(), **(TRUNK | {"total": 50, "decay": 10}))
    branch.load_state_dict(trunk.state_dict())
    assert branch.get_last_lr() == pytest.approx([rate * 0.5 ** (1 / 4) for rate in RATES])


def test_tokens_follow_the_curve_through_a_growing_batch() -> None:
    optimizer = make_optimizer()
    settings: dict[str, Any] = {"total": 100_000, "warmup": 8_000, "decay": 40_000, "half_life": 10_000}
    scheduler = WSDScheduler(optimizer, **settings, unit="tokens", tokens_per_step=1_000)
    curve = WSD(**settings, unit="tokens")
    tokens = 0
    while tokens < 100_000:
        tokens += 2_000 if tokens >= 30_000 else 1_000
        assert optimizer.param_groups[1]["lr"] == pytest.approx(RATES[1] * curve.factor(tokens), rel=1e-12)
        optimizer.step()
        if tokens == 30_000:
            scheduler.advance(2_000)
        else:
            scheduler.step()
    state = json.loads(json.dumps(scheduler.state_dict()))
    other = make_optimizer()
    again = WSDScheduler(other, **settings, unit="tokens", tokens_per_step=1_000)
    again.load_state_dict(state)
    other.step()
    again.step()
    assert (again.position, again.tokens_per_step) == (scheduler.position + 2_000, 2_000)


def test_deepspeed_interface() -> None:
    """DeepSpeed calls step(**lr_kwargs), get_last_lr, state_dict and load_state_dict, and reads param_groups."""
    optimizer = make_optimizer()
    scheduler = WSDScheduler(optimizer, total=10_000, decay=0, warmup=4_000, unit="tokens", tokens_per_step=1_000)
    lr_kwargs: dict[str, int] = {"tokens": 3_000}
    optimizer.step()
    scheduler.step(**lr_kwargs)
    assert scheduler.get_last_lr() == list(RATES)
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)


def test_tensor_rates_are_updated_in_place() -> None:
    rate = put(torch.tensor(0.01))
    optimizer = torch.optim.AdamW([torch.nn.Parameter(put(torch.zeros(1)))], lr=rate, foreach=False)
    scheduler = ConstantScheduler(optimizer, warmup=4)
    held = optimizer.param_groups[0]["lr"]
    optimizer.step()
    scheduler.step()
    assert held.item() == pytest.approx(0.005)
    scheduler.load_state_dict(scheduler.state_dict() | {"position": 3})
    assert held.item() == pytest.approx(0.0075)


@pytest.mark.parametrize(
    "settings",
    [
        {"unit": "tokens"},
        {"unit": "steps", "tokens_per_step": 5},
        {"unit": "tokens", "tokens_per_step": 5, "last_epoch": 3},
    ],
)
def test_counting_that_cannot_work_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="ConstantScheduler: "):
        ConstantScheduler(make_optimizer(), **settings)
    with pytest.raises(UserError, match="counts steps, not tokens"):
        ConstantScheduler(make_optimizer()).step(tokens=5)
