"""metrics.jsonl read back, TensorBoard read back by TensorBoard, and the console line: observers without a run."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from minicpm_megatron.checkpoint.ranks import Ranks
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import BatchPlan, Recipe, load_recipe
from minicpm_megatron.recipe.dump import RECIPE, dump_recipe
from minicpm_megatron.recipe.schema import BatchGrowth
from minicpm_megatron.training import report
from minicpm_megatron.training.compare import read_curve
from minicpm_megatron.training.metrics import METRICS, duration, human, read_metrics, truncate_after
from minicpm_megatron.training.observation import Observers, observer_factories
from minicpm_megatron.training.observer import Evaluation, RunInfo, StepRecord
from minicpm_megatron.training.report import PICTURE, decay_effect, draw_loss, finish
from tests.training import nano

FLOPS, PEAK = 2e6, 4e9


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    return load_recipe(nano.write_recipe(tmp_path), ["name=x", "logging.tensorboard=true", "logging.interval=2"])


def record(step: int, loss: float = 3.0) -> StepRecord:
    return StepRecord(
        step=step,
        tokens=step * 1000,
        loss=loss,
        lr=0.01,
        gradient_norm=1.5,
        seconds=0.5,
        step_tokens=1000,
        sequence_length=100,
        memory_bytes=2**30,
    )


@contextlib.contextmanager
def watching(
    folder: Path, recipe: Recipe, *, start: int = 0, evaluate_again: bool = False, rank: int = 0
) -> Iterator[Observers]:
    """The recipe's observers, over a run of 10 steps of which `start` are done."""
    ranks = Ranks(None)
    ranks.rank = rank
    observers = Observers(observer_factories(recipe), recipe, ranks)
    observers.start(
        RunInfo(
            recipe=recipe,
            folder=folder,
            rank=rank,
            start=start,
            total=10,
            evaluation_due=evaluate_again,
            flops_per_token=lambda length: FLOPS,
            peak_flops=PEAK,
            tell=observers.tell,
        )
    )
    try:
        yield observers
    finally:
        observers.end()


def write(folder: Path, recipe: Recipe, steps: range, loss: float = 3.0, **keywords: bool) -> None:
    """Steps after `steps.start`, each with an evaluation."""
    with watching(folder, recipe, start=steps.start, **keywords) as observers:
        for step in range(steps.start + 1, steps.stop + 1):
            observers.step(record(step, loss))
            losses = {"en": {"loss_per_token": loss, "loss_per_byte": loss / 4}}
            observers.evaluation(Evaluation(step, step * 1000, losses))
        observers.check()


def scalars(folder: Path, tag: str) -> dict[int, float]:
    board = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    board.Reload()
    return {event.step: event.value for event in board.Scalars(tag)}


def test_every_step_stands_once_with_rates_that_follow_from_its_time(recipe: Recipe, tmp_path: Path) -> None:
    write(tmp_path, recipe, range(0, 3))
    steps = read_metrics(tmp_path / METRICS)
    assert [line["step"] for line in steps] == [1, 2, 3]
    assert steps[1] == {
        "kind": "train",
        "step": 2,
        "tokens": 2000,
        "seconds": 0.5,
        "loss": 3.0,
        "lr": 0.01,
        "gradient_norm": 1.5,
        "tokens_per_second": 2000.0,
        "model_flops_per_second": 2000.0 * FLOPS,
        "utilisation": 1.0,
        "memory_bytes": 2**30,
        "sequence_length": 100,
    }
    evaluations = read_metrics(tmp_path / METRICS, "evaluation")
    assert [(line["step"], line["set"], line["loss_per_byte"]) for line in evaluations] == [
        (1, "en", 0.75),
        (2, "en", 0.75),
        (3, "en", 0.75),
    ]
    assert scalars(tmp_path, "train/loss") == {1: 3.0, 2: 3.0, 3: 3.0}
    assert scalars(tmp_path, "evaluation/en/loss_per_byte") == {1: 0.75, 2: 0.75, 3: 0.75}


@pytest.mark.parametrize(("again", "kept"), [(False, [1, 2]), (True, [1])])
def test_steps_done_again_replace_what_was_told_of_them(
    again: bool, kept: list[int], recipe: Recipe, tmp_path: Path
) -> None:
    write(tmp_path, recipe, range(0, 4), loss=3.0)
    with open(tmp_path / METRICS, "a") as handle:
        handle.write('{"kind": "train", "step": 5, "lo')  # a kill in the middle of a line
    write(tmp_path, recipe, range(2, 5), loss=2.0, evaluate_again=again)
    told = [(line["step"], line["loss"]) for line in read_metrics(tmp_path / METRICS)]
    assert told == [(1, 3.0), (2, 3.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    evaluations = [(line["step"], line["loss_per_token"]) for line in read_metrics(tmp_path / METRICS, "evaluation")]
    assert evaluations == [(step, 3.0) for step in kept] + [(3, 2.0), (4, 2.0), (5, 2.0)]
    assert all(json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines())
    assert scalars(tmp_path, "train/loss") == dict(told)


def test_the_console_line_averages_over_the_steps_since_the_last(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, recipe, range(0, 4))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split(" | ")[0] for line in lines] == ["step  1/10", "step  2/10", "step  4/10"]
    assert lines[-1] == (
        "step  4/10 | loss 3.0000 | lr 1.00e-02 | grad 1.500 | 4 k tokens | 2,000 tokens/s | 4 GFLOP/s (100%) | "
        "1.00 GiB | ETA 0:00:03"
    )


def test_a_rank_that_does_not_write_leaves_no_trace(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with watching(tmp_path / "run", recipe, rank=1) as observers:
        observers.step(record(1))
        observers.evaluation(Evaluation(1, 1000, {"en": {"loss_per_token": 1.0, "loss_per_byte": 1.0}}))
    assert capsys.readouterr().out == "" and not (tmp_path / "run").exists()


def test_a_skipped_step_and_what_undid_steps_are_told(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, recipe, range(0, 2))
    with watching(tmp_path, recipe, start=2) as observers:
        observers.step(replace(record(3, math.nan), gradient_norm=None, skipped="the loss is nan"))
        observers.step(record(4))
        observers.rewind(3, "rolled back")
        observers.step(record(4, loss=2.5))
        observers.check()
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / METRICS).read_text().splitlines()]
    told = [(line["kind"], line["step"], line.get("loss")) for line in lines if line["kind"] != "evaluation"]
    assert told == [("train", 1, 3.0), ("train", 2, 3.0), ("train", 3, None), ("event", 3, None), ("train", 4, 2.5)]
    (third,) = (line for line in lines if line["step"] == 3 and line["kind"] == "train")
    assert (third["skipped"], third["cause"], third["gradient_norm"]) == (True, "the loss is nan", None)
    assert scalars(tmp_path, "train/loss") == {1: 3.0, 2: 3.0, 4: 2.5}
    said = capsys.readouterr().out.splitlines()
    assert "skipped: the loss is nan" in said and "rolled back" in said
    draw_loss(tmp_path, recipe, entropy=4.0)


def test_the_picture_marks_where_the_batch_grows(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As figure 12: the first drop of 1.2B's loss is where its batch doubles."""
    first = recipe.training.global_batch_size
    plan = BatchPlan(recipe)
    growth = BatchGrowth(after_tokens=plan.tokens(4), global_batch_size=2 * first)
    grows = recipe.model_copy(update={"training": recipe.training.model_copy(update={"batch_growth": (growth,)})})
    with watching(tmp_path, recipe) as observers:
        for step in range(1, 9):
            observers.step(record(step))
    seen = {}

    def look(figure: Any, path: Path) -> Path:
        upper = figure.axes[0]
        seen["texts"] = [each.get_text() for each in upper.texts]
        seen["at"] = [line.get_xdata()[0] for line in upper.lines if len(set(line.get_xdata())) == 1]
        return path

    monkeypatch.setattr(report, "save_picture", look)
    draw_loss(tmp_path, grows, entropy=4.0)
    assert f" batch {first} to {2 * first} samples" in seen["texts"] and seen["at"] == [4]
    draw_loss(tmp_path, recipe, entropy=4.0)
    assert not any("batch" in text for text in seen["texts"]) and seen["at"] == []


def test_a_place_that_cannot_be_written_is_told_when_asked(recipe: Recipe, tmp_path: Path) -> None:
    (tmp_path / METRICS).mkdir()
    with watching(tmp_path, recipe) as observers:
        observers.step(record(1))
        with pytest.raises(UserError, match="cannot write metrics"):
            observers.check()


def test_numbers_are_told_with_their_units() -> None:
    assert [human(value) for value in (7, 1234, 2_500_000, 3e9, 4.5e12, 6e15)] == [
        "7 ",
        "1.23 k",
        "2.5 M",
        "3 G",
        "4.5 T",
        "6 P",
    ]
    assert [duration(seconds) for seconds in (0, 61.9, 3600, 360_000)] == ["0:00:00", "0:01:01", "1:00:00", "100:00:00"]


def flipped(content: bytes) -> Iterator[bytes]:
    """The content with one bit of one byte changed, another bit in each byte."""
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << (place * 5 + place // 8) % 8
        yield bytes(damaged)


NO_METRICS_LINES = (
    b"\xff",
    b"7",
    b"[]",
    b"null",
    b'{"kind": "train"}',
    b'{"kind": ["train"], "step": 1}',
    b'{"kind": "train", "step": "1"}',
    b'{"kind": "train", "step": true}',
    b'{"kind": "train", "step": -1}',
    b'{"kind": "train", "step": 1e999}',
    b"[" * 100_000,
    b'{"kind": "train", "step": 1, "lo\xf3s": 3.0}',
)


@pytest.mark.parametrize("line", NO_METRICS_LINES, ids=lambda line: line[:32].decode(errors="replace"))
def test_a_line_that_is_no_metrics_line_is_dropped_and_named(
    line: bytes, recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, recipe, range(0, 2))
    path = tmp_path / METRICS
    first, rest = path.read_bytes().split(b"\n", 1)
    path.write_bytes(first + b"\n" + line + b"\n" + rest)
    capsys.readouterr()
    assert [record["step"] for record in read_metrics(path, needs=("loss",))] == [1, 2]
    assert f"{path}:2: not a metrics line, left out" in capsys.readouterr().err
    write(tmp_path, recipe, range(2, 3))
    assert path.read_bytes().startswith(first + b"\n" + rest), "a restart drops it, and nothing else"


def test_what_a_kill_cut_short_is_not_named(recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, recipe, range(0, 1))
    with open(tmp_path / METRICS, "a") as handle:
        handle.write('{"kind": "train", "st')
    write(tmp_path, recipe, range(1, 2))
    assert [record["step"] for record in read_metrics(tmp_path / METRICS)] == [1, 2]
    assert capsys.readouterr().err == ""


def test_no_flipped_bit_stops_whoever_reads_them(recipe: Recipe, tmp_path: Path) -> None:
    write(tmp_path, recipe, range(0, 3))
    (tmp_path / RECIPE).write_text(dump_recipe(recipe))
    path = tmp_path / METRICS
    whole = path.read_bytes()
    lines = len(whole.splitlines())
    for damaged in flipped(whole):
        path.write_bytes(damaged)
        curve = read_curve(tmp_path)
        assert len(curve.held_out) == 1 and math.isfinite(curve.loss)
        assert decay_effect(tmp_path, recipe) is not None
        truncate_after(path, 100)
        left = path.read_bytes().splitlines()
        assert set(left) <= set(damaged.splitlines()) and len(left) >= lines - 2


def test_what_follows_the_last_checkpoint_fails_no_run(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, recipe, range(0, 3))
    (tmp_path / PICTURE).mkdir()
    capsys.readouterr()
    finish(tmp_path, recipe)
    said = capsys.readouterr()
    assert said.err.startswith("note: the run is finished and saved, but ") and said.err.count("\n") == 1
    assert f"{tmp_path / PICTURE} could not be drawn (IsADirectoryError " in said.err
    assert said.out.startswith("loss 3.000 nats per token over the last 3 steps"), "the rest is still said"

    def out_of_memory(*_: object) -> float:
        raise MemoryError

    monkeypatch.setattr(report, "blend_entropy", out_of_memory)
    finish(tmp_path, recipe)
    assert capsys.readouterr().err.count("(MemoryError)") == 2
