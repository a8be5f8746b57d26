"""Runs side by side, from metrics written by hand."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import build, dump_recipe, load_recipe
from minicpm_megatron.training.compare import equal_flops, format_table, read_curve, shifted
from tests.cli.commands import command
from tests.convert.conftest import EXPERTS, small_model
from tests.pictures import drawn


def write_run(
    folder: Path,
    name: str,
    first: int,
    last: int,
    curriculum: Any = (),
    sets: dict[str, float] | None = None,
    **model: Any,
) -> Path:
    """A run of 4 samples of 32 tokens a step, evaluated every 5 steps, whose losses are 10 - step / 10.

    Args:
        sets: validation set -> what is added to its losses; default: en and, 1 above it, zh.
    """
    recipe = build(
        {
            "name": name,
            "model": small_model(**model).model_dump(mode="json"),
            "data": {"train": [{"prefix": "data/train"}], "sequence_length": 32, "curriculum": curriculum},
            "training": {"global_batch_size": 4, "micro_batch_size": 2},
            "schedule": {"shape": "constant", "total": 100},
        }
    )
    run = folder / name
    run.mkdir()
    (run / "recipe.yaml").write_text(dump_recipe(recipe))
    lines: list[dict[str, Any]] = []
    for step in range(first, last + 1):
        lines.append({"kind": "train", "step": step, "tokens": 128 * step, "loss": 10 - step / 10})
        if step % 5 == 0:
            for held_out, more in (sets or {"en": 0, "zh": 1}).items():
                loss = 10 - step / 10 + more
                lines.append(
                    {"kind": "evaluation", "step": step, "set": held_out, "tokens": 128 * step, "loss_per_token": loss}
                )
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def flops_by_hand(active_experts: int, width: int, length: int = 32) -> float:
    """6 for each weight that multiplies a token, and attention: 6 layers, width 96, 8 heads on 2 of 12 channels."""
    attention = 96 * (8 + 2 * 2) * 12 + 96 * 96
    router = 5 * 96 if active_experts > 1 else 0
    layer = attention + 2 * 96 + router + active_experts * 3 * 96 * width
    return 6 * (6 * layer + 96) + 6 * 96 * 400 + 12 * 6 * 8 * 12 * length


def test_a_run_counts_its_own_steps(tmp_path: Path) -> None:
    curve = read_curve(write_run(tmp_path, "moe", 31, 40, **EXPERTS))
    assert (curve.name, curve.first_step, curve.tokens) == ("moe", 30, 1280)
    assert curve.flops == pytest.approx(1280 * flops_by_hand(2, 72))
    assert curve.held_out == {"en": 6.0, "zh": 7.0}
    assert curve.loss == pytest.approx(sum(10 - step / 10 for step in range(31, 41)) / 10)
    assert [(tokens, losses) for tokens, _, losses in curve.points] == [
        (640, {"en": 6.5, "zh": 7.5}),
        (1280, {"en": 6.0, "zh": 7.0}),
    ]
    assert curve.parameters[0] > curve.parameters[1]


def test_a_batch_that_grows_counts_by_the_plan(tmp_path: Path) -> None:
    run = write_run(tmp_path, "grows", 1, 20)
    fields = load_recipe(run / "recipe.yaml").model_dump(mode="json")
    fields["training"]["batch_growth"] = [{"after_tokens": 1280, "global_batch_size": 16}]
    (run / "recipe.yaml").write_text(dump_recipe(build(fields)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["tokens"] = 128 * min(line["step"], 10) + 512 * max(0, line["step"] - 10)
    del lines[3]  # a damaged line was left out
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curve = read_curve(run)
    assert (curve.tokens, curve.first_tokens, curve.points[-1][0]) == (6400, 0, 6400)


def test_short_rows_cost_less(tmp_path: Path) -> None:
    curve = read_curve(write_run(tmp_path, "grows", 1, 10, [{"sequence_length": 8, "until": 7}]))
    short, long = flops_by_hand(1, 240, 8), flops_by_hand(1, 240)
    assert curve.flops == pytest.approx(128 * (7 * short + 3 * long))
    assert [flops for _, flops, _ in curve.points] == pytest.approx([128 * 5 * short, curve.flops])


def test_in_the_picture_a_branch_follows_on_its_trunk(tmp_path: Path) -> None:
    trunk, branch = (read_curve(write_run(tmp_path, *run)) for run in (("trunk", 1, 40), ("branch", 31, 40)))
    alone, after = shifted([trunk, branch])
    # the same model on the same data: where both were evaluated, tokens and FLOPs agree
    assert after == [pytest.approx(point) for point in alone[6:]]
    assert after[0] == pytest.approx((35 * 128, 35 * 128 * flops_by_hand(1, 240), 7.0))
    [together, _] = shifted([branch, branch])
    begun = [(tokens, flops, sum(losses.values()) / 2) for tokens, flops, losses in branch.points]
    assert together == [pytest.approx(point) for point in begun], "from where they parted"
    # experts that begin where a dense run stood have the dense run's cost behind them
    [_, moe] = shifted([trunk, read_curve(write_run(tmp_path, "moe", 31, 40, **EXPERTS))])
    assert moe[0][1] == pytest.approx(128 * (30 * flops_by_hand(1, 240) + 5 * flops_by_hand(2, 72)))


def test_steps_of_equal_flops(tmp_path: Path) -> None:
    dense, moe = write_run(tmp_path, "dense", 1, 2), write_run(tmp_path, "moe", 1, 2, **EXPERTS)
    ratio = flops_by_hand(2, 72) / flops_by_hand(1, 240)
    assert equal_flops(dense, moe, 1000) == round(1000 * ratio)
    assert equal_flops(dense, dense, 7) == 7


def test_the_command_prints_a_table_and_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, "dense", 31, 40), write_run(tmp_path, "moe", 31, 35, **EXPERTS)]
    picture = tmp_path / "moe" / "comparison.png"
    with drawn() as figures:
        assert command("compare_runs.py", "--runs", *runs, "--output", picture) == 0
    assert [axis.get_xlabel() for axis in figures[0].axes] == [
        "tokens since the runs parted",
        "FLOPs since the runs parted",
    ]
    printed = capfd.readouterr().out
    assert format_table([read_curve(run) for run in runs]) in printed and str(picture) in printed
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert command("compare_runs.py", "--runs", *runs, "--equal-flops", 10) == 0
    assert capfd.readouterr().out == f"{equal_flops(*runs, 10)}\n"


def test_a_mean_is_over_the_sets_that_all_runs_share(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    three = write_run(tmp_path, "three", 1, 10, sets={"code": -3, "en": 0, "zh": 1})
    two = write_run(tmp_path, "two", 1, 10)
    with drawn() as figures:
        assert command("compare_runs.py", "--runs", three, two, "--output", tmp_path / "x.png") == 0
    head, first, second, *_ = (re.split(" {2,}", line) for line in capfd.readouterr().out.splitlines())
    # step 10 of both is the same on what both have read
    assert head[-4:] == ["code", "en", "zh", "mean over en, zh"]
    assert (first[-4:], second[-4:]) == (
        ["6.0000", "9.0000", "10.0000", "9.5000"],
        ["-", "9.0000", "10.0000", "9.5000"],
    )
    [left, _] = figures[0].axes
    assert [list(line.get_ydata()) for line in left.get_lines()] == [[pytest.approx(10), pytest.approx(9.5)]] * 2
    assert left.get_ylabel() == "validation loss (nats per token)\nmean over en, zh"


def test_an_evaluation_without_a_shared_set_has_no_mean(tmp_path: Path) -> None:
    """zh was added to the run's recipe after its first evaluation."""
    run = write_run(tmp_path, "more", 1, 10)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if (line["step"], line.get("set")) != (5, "zh")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    [points] = shifted([read_curve(run)])
    assert [(tokens, loss) for tokens, _, loss in points] == [(1280, 9.5)]


def test_runs_that_share_no_set_have_no_picture(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path, name, 1, 10, sets={name: 0}) for name in ("en", "zh")]
    assert command("compare_runs.py", "--runs", *runs, "--output", tmp_path / "x.png") == 2
    printed = capfd.readouterr()
    assert [re.split(" {2,}", line)[-3:] for line in printed.out.splitlines()] == [
        ["en", "zh", "mean"],
        ["9.0000", "-", "-"],
        ["-", "9.0000", "-"],
    ]
    assert "no validation set that all runs read" in printed.err and printed.err.count("\n") == 1
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "nowhere"], "nowhere: no recipe.yaml in it"),
        (["--runs", "empty"], "empty: has made no step; start it first"),
        (["--runs", "run", "--output", "none/x.png"], "none: no such folder"),
        (["--runs", "run", "--output", "run"], "run: is a folder, not a picture"),
        (["--runs", "run", "--equal-flops", "3"], "--equal-flops: takes two runs and a number of steps"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    write_run(tmp_path, "run", 1, 3)
    (write_run(tmp_path, "empty", 1, 1) / "metrics.jsonl").unlink()
    monkeypatch.chdir(tmp_path)
    assert command("compare_runs.py", *arguments) == 2
    output = capfd.readouterr()
    assert output.out == "" and output.err == f"error: {output.err[7:]}" and message in output.err


def test_a_run_without_evaluations(tmp_path: Path) -> None:
    run = write_run(tmp_path, "short", 1, 3)
    assert read_curve(run).held_out == {}
    assert "-" in format_table([read_curve(run)]).splitlines()[1]
    with pytest.raises(UserError, match="no recipe"):
        read_curve(tmp_path)
