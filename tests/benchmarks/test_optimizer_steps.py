"""Steps to another optimizer's loss, where losses follow a law that is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks import optimizer_steps

RATES, SIZES, SEEDS = (0.01, 0.02, 0.04), ((32, 2), (64, 2)), (1, 2)
FASTER = {(32, 2): 0.9, (64, 2): 0.7}  # of the steps


def write_sweep(folder: Path, optimizer: str, steps: int) -> None:
    """Losses of 6 - log(steps), a parabola over the rate above that, and an offset of each seed."""
    cells = []
    for width, layers in SIZES:
        for seed in SEEDS:
            for rate in RATES:
                gained = FASTER[width, layers] if optimizer == "muon" else 1.0
                loss = 6 - math.log(steps / gained) + 0.1 * math.log2(rate / 0.02) ** 2 + 0.05 * seed
                labels = {"width": width, "layers": layers, "seed": seed, "rate": rate, "parametrization": "mup"}
                cells.append({"held_out": loss, "labels": labels})
    target = folder / f"{optimizer}-{steps}"
    target.mkdir()
    (target / "results.json").write_text(json.dumps({"kind": "lr", "cells": cells}))


def test_the_share_of_steps_is_that_of_the_law(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sweep(tmp_path, "adamw", 200)
    for steps in (100, 150, 200):
        write_sweep(tmp_path, "muon", steps)
    comparison = optimizer_steps.Comparison.of(tmp_path)
    for size, share in FASTER.items():
        assert comparison.shares(size) == pytest.approx([share] * 2, rel=1e-9)
    monkeypatch.setattr("sys.argv", ["optimizer_steps", str(tmp_path), "--picture", str(tmp_path / "steps.png")])
    assert optimizer_steps.main() == 0
    printed = capsys.readouterr().out
    losses = [6.075 - math.log(steps) for steps in (200, 200 / 0.7)]  # the mean over seeds adds 0.075
    assert f"| 64x2 | 0.0200 | {losses[0]:.4f} | 0.0200 | {losses[1]:.4f} | 0.70 (0.70, 0.70) |" in printed
    assert "muon: best rates within 0.00 octaves" in printed
    assert (tmp_path / "steps.png").stat().st_size > 10_000


def test_a_loss_that_was_not_reached_has_no_steps() -> None:
    assert math.isnan(optimizer_steps.steps_to([4.0, 3.5], [100, 200], 3.4))
    assert optimizer_steps.steps_to([4.0, 3.5], [100, 200], 3.75) == pytest.approx(100 * math.sqrt(2))
    # the first time, where noise lets the loss rise again
    assert 100 < optimizer_steps.steps_to([3.5, 3.3, 3.4], [100, 150, 200], 3.35) < 150


def test_what_cannot_be_compared_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["optimizer_steps", str(tmp_path)])
    faults = {
        ("adamw", 200): "not two or more sweeps of one other optimizer",
        ("muon", 100): "not two or more sweeps of one other optimizer",
        ("muon", 150): "no other sweep of 200 steps",
        ("adamw", 150): "2 sweeps called adamw-STEPS",
    }
    for sweep, fault in faults.items():
        write_sweep(tmp_path, *sweep)
        assert optimizer_steps.main() == 2
        [line] = capsys.readouterr().err.splitlines()
        assert fault in line
