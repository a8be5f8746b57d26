"""tools/windtunnel.py as a user runs it, with input right and wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from minicpm_megatron.recipe import load_recipe
from minicpm_megatron.training.metrics import GRADIENTS, METRICS, read_metrics
from minicpm_megatron.windtunnel.cells import make_cell
from minicpm_megatron.windtunnel.launch import Launcher
from minicpm_megatron.windtunnel.law.losses_csv import read_losses
from minicpm_megatron.windtunnel.queue import Queue
from minicpm_megatron.windtunnel.results import read_results
from tests.cli.commands import ROOT, command, error_lines, tree, untouched
from tests.windtunnel.subcommands import EXPERIMENTS
from tests.windtunnel.warm import WarmTrainer

LR = ["lr", "--recipe", "recipe.yaml", "--output", "out", "--sizes", "32x1", "--rates", "0.004,0.008,0.016"]
WSD = ["wsd", "--recipe", "recipe.yaml", "--output", "out", "--shares", "0.1,0.2", "--ends", "1"]
BATCH = ["batch-size", "--recipe", "recipe.yaml", "--output", "out", "--sizes", "32x1", "--tokens", "5000"]
BATCH += ["--batches", "64,128,256,512"]
ENVELOPE = ["envelope", "--recipe", "recipe.yaml", "--output", "out", "--sizes", "32x1,32x2"]
SEARCH = ["search", "--recipe", "recipe.yaml", "--output", "out", "--size", "32x1"]
LAW = ["scaling-law", "--recipe", "recipe.yaml", "--output", "out", "--sizes", "32x1,32x2,48x1"]
STUDY = ["decay-study", "--recipe", "recipe.yaml", "--output", "out", "schedule.total=42", "--decay-share", "0.45"]
STUDY += ["--checkpoints", "2"]


def test_wsd_on_real_tokens(here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["schedule.total=20", "--shapes", "exponential,1-sqrt", "--periods", "0.5", "--launcher", warm.launcher]
    assert command("windtunnel.py", *WSD, *more, "--seeds", "1,2", "--workers", "2") == 0
    text = capsys.readouterr().out
    assert "[16/16 cells, 100% of the FLOPs" in text
    results = read_results(here / "out")
    assert {cell["state"] for cell in results.cells} == {"done"} and len(results.cells) == 16
    assert {(here / "out" / picture.file).stat().st_size > 10_000 for picture in results.pictures} == {True}
    by_name = {cell["name"]: cell for cell in results.cells}
    branch = read_metrics(here / "out" / "cells" / "wsd-1-decay0.2-exponential-s1" / METRICS)
    assert [record["step"] for record in branch] == [17, 18, 19, 20]
    assert branch[-1]["lr"] == pytest.approx(0.01 / 32)
    assert by_name["wsd-1-decay0.2-exponential-s1"]["tokens"] == 4 * 4 * 32
    # one trunk of 18 steps, and decays of 2 and 4 steps in two shapes, for four runs of 20
    assert "7,680 tokens trained for what separate runs would have taken 20,480: 38%" in text

    assert command("windtunnel.py", "report", "--runs", "out") == 0
    assert "DISAGREES" in capsys.readouterr().out or results.findings[1].agrees is not False
    assert command("windtunnel.py", "report", "--runs", "out", "--output", "page.md") == 0
    page = (here / "page.md").read_text()
    assert all(finding.claim in page for finding in results.findings) and "](out/decays.png)" in page


def test_batch_sizes_on_real_tokens(here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*BATCH, "--launcher", warm.launcher, "--workers", "2", "evaluation.batches=4"]
    assert command("windtunnel.py", *given) == 0
    results = read_results(here / "out")
    assert {cell["state"] for cell in results.cells} == {"done"} and len(results.cells) == 4
    assert {cell["tokens"] for cell in results.cells} == {5120}
    assert (here / "out" / results.pictures[0].file).stat().st_size > 10_000
    for batch in (64, 512):
        evaluations = read_metrics(here / "out" / "cells" / f"32x1-batch{batch}-s1" / METRICS, "evaluation")
        tokens = [record["tokens"] for record in evaluations if record["step"]]
        assert tokens == list(range(512, 5121, 512))
    starts = len(warm.starts(here / "out"))
    capsys.readouterr()
    # other questions to the same runs
    assert command("windtunnel.py", *given, "--losses", "6.3,6.2", "--predict", "6") == 0
    text = capsys.readouterr().out
    assert "4 of 4 cells are done already" in text and len(warm.starts(here / "out")) == starts == 4
    assert read_results(here / "out").settings == results.settings


def test_an_envelope_on_real_tokens(here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    lengths = ["--tokens-per-parameter", "0.05,0.25", "--points", "6", "--large-tokens-per-parameter", "0.05"]
    given = [*ENVELOPE, *lengths, "--launcher", warm.launcher, "--workers", "2"]
    assert command("windtunnel.py", *given) == 0
    results = read_results(here / "out")
    assert {cell["state"] for cell in results.cells} == {"done"} and len(results.cells) == 9
    assert len(results.findings) == 3 and len(results.tables) == 3
    assert (here / "out" / results.pictures[0].file).stat().st_size > 10_000
    trunk = read_metrics(here / "out" / "cells" / "trunk-32x1-s1" / METRICS)
    branch = read_metrics(here / "out" / "cells" / "32x1-0.25N-s1" / METRICS)
    assert branch[0]["step"] == trunk[-1]["step"] + 1 and branch[-1]["lr"] < trunk[-1]["lr"] == 0.01
    shown = {row[0]: row[4] for row in results.tables[0].rows}  # the last row of each size
    evaluated = read_metrics(here / "out" / "cells" / "32x2-0.05N-s1" / METRICS, "evaluation")
    assert shown["32x2"] == f"{evaluated[-1]['loss_per_token']:.4f}"
    capsys.readouterr()
    assert command("windtunnel.py", *given) == 0
    assert len(warm.starts(here / "out")) == 9 and read_results(here / "out").findings == results.findings


def test_a_scaling_law_on_real_tokens(here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--tokens-per-parameter", "0.05,0.15", "--points", "3", "--launcher", warm.launcher, "--workers", "2"]
    given = [*LAW, *more, "data.validation={held-out: held-out, seen: tokens}"]
    assert command("windtunnel.py", *given) == 0
    text = capsys.readouterr().out
    assert "[12/12 cells, 100% of the FLOPs" in text and "; as separate runs: " in text
    results = read_results(here / "out")
    assert len(results.cells) == 12 and {cell["state"] for cell in results.cells} == {"done"}
    starts = len(warm.starts(here / "out"))
    assert starts == 12
    branch = [record["step"] for record in read_metrics(here / "out" / "cells" / "32x2-0.15N" / METRICS)]
    trunk = [record["step"] for record in read_metrics(here / "out" / "cells" / "trunk-32x2" / METRICS)]
    assert branch[0] == trunk[-1] + 1 and trunk[0] == 1  # a decay begins where the trunk ends
    losses = read_losses(here / "out" / "losses.csv")
    assert {name: len(each) for name, each in losses.items()} == {"held-out": 9, "seen": 9}
    evaluations = read_metrics(here / "out" / "cells" / "32x1-0.15N" / METRICS, "evaluation")
    assert losses["held-out"][2].loss == evaluations[0]["loss_per_byte"]
    for each in results.pictures:
        assert (here / "out" / each.file).stat().st_size > 10_000
    assert "mean of the sets" in text and len(results.pictures) == 4

    assert command("windtunnel.py", *given) == 0  # nothing is left to run
    assert len(warm.starts(here / "out")) == starts and read_results(here / "out").findings == results.findings
    capsys.readouterr()
    assert command("windtunnel.py", "fit", "--csv", "out/losses.csv") == 0
    fitted = capsys.readouterr().out
    assert all(finding.ours in fitted for finding in results.findings[:3])


def test_a_decay_study_on_real_tokens(here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    given = [*STUDY, "--launcher", warm.launcher]
    assert command("windtunnel.py", *given) == 0
    text = capsys.readouterr().out
    assert "[2/2 cells, 100% of the FLOPs" in text and "checkpoints kept: 7 of " in text
    results = read_results(here / "out")
    assert len(results.findings) == 8 and {cell["state"] for cell in results.cells} == {"done"}
    trunk, decay = (here / "out" / "cells" / name / METRICS for name in ("trunk-s1", "decay-s1"))
    # of the last step there is no next gradient
    assert [each["step"] for each in read_metrics(trunk, GRADIENTS)] == list(range(5, 42))
    assert [each["step"] for each in read_metrics(decay, GRADIENTS)] == list(range(24, 42))
    # the first step of the decay has the trunk's weights and data, and another rate
    one, other = (next(each for each in read_metrics(path, GRADIENTS) if each["step"] == 24) for path in (trunk, decay))
    assert one["gradient_norm"] == other["gradient_norm"]
    for each in results.pictures:
        assert (here / "out" / each.file).stat().st_size > 10_000

    assert command("windtunnel.py", *given) == 0  # nothing is left to run
    assert len(warm.starts(here / "out")) == 2 and read_results(here / "out").findings == results.findings


@pytest.mark.parametrize("launcher", ["", "deepspeed --num_gpus 2"])
def test_the_real_launchers_run_a_cell(launcher: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    base = load_recipe("recipe.yaml", ["training.micro_batch_size=2", "schedule.total=6"])
    cell = make_cell(base, here / "out", "only", {}, {})
    said: list[str] = []
    outcome = Queue([cell], Launcher.of(ROOT / "examples" / "train.py", launcher, 1, ""), said.append).run()
    assert outcome.done == ["only"], (said, (cell.folder / "log.txt").read_text())
    assert [record["step"] for record in read_metrics(cell.folder / METRICS)] == list(range(1, 7))


def test_a_dry_run_prints_the_plan_and_writes_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tree(here)
    more = ["schedule.total=10", "--dry-run", "--flops-per-second", "1e9", "training.global_batch_size=8"]
    assert command("windtunnel.py", *LR, *more) == 0  # overrides may stand anywhere
    last = capsys.readouterr().out.splitlines()[-2]
    assert last.startswith("6 cells") and f" {6 * 10 * 8 * 32:,} " in last
    assert tree(here) == before


def full(folder: Path) -> None:
    (folder / "out").mkdir()
    (folder / "out" / "mine").write_text("x")


def results(content: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "out").mkdir()
        (folder / "out" / "results.json").write_text(content)

    return write


REPORT = ["report", "--runs", "out"]
MISTAKES: dict[str, tuple[list[str], Callable[[Path], object], str]] = {
    "no subcommand": ([], untouched, "SUBCOMMAND"),
    "no such subcommand": (["fly"], untouched, "no subcommand 'fly'; there are lr, batch-size"),
    "a mistyped subcommand": (["batch_sizes"], untouched, "no subcommand 'batch_sizes'; did you mean batch-size?"),
    "an unknown option": ([*LR, "--sise", "3"], untouched, "unrecognized arguments: --sise"),
    "report: an override": (["report", "--runs", "out", "--output", "x", "a=1"], untouched, "unrecognized"),
    "no recipe": (["lr", "--recipe", "no.yaml", "--output", "out", "--sizes", "32x1"], untouched, "no.yaml: cannot"),
    "an unknown key": ([*LR, "optimizer.rl=1"], untouched, "did you mean optimizer.lr?"),
    "nothing held out": ([*LR, "data.validation={}"], untouched, "data.validation: the experiment compares"),
    "no tokens": ([*LR, "data.train.0.prefix=none"], untouched, "none"),
    "another vocabulary": ([*LR, "model.vocab_size=500"], untouched, "made for a vocabulary of 600"),
    "no sizes": ([*LR, "--sizes", "32"], untouched, "--sizes: '32' is no size; give WIDTHxLAYERS"),
    "a size of nothing": ([*LR, "--sizes", "32x0"], untouched, "--sizes: '32x0' is no size"),
    "a size that has no heads": ([*LR, "--sizes", "40x2"], untouched, "40 does not divide into heads of 16"),
    "a size twice": ([*LR, "--sizes", "32x1,32x1"], untouched, "--sizes: not a list of different"),
    "two rates": ([*LR, "--rates", "0.1,0.2"], untouched, "--rates: not a list of at least three"),
    "a rate of nothing": ([*LR, "--rates", "0,0.1,nan"], untouched, "--rates: not a list of at least three"),
    "rates in words": ([*LR, "--standard-rates", "low"], untouched, "--standard-rates: 'low' is not"),
    "a third parametrisation": ([*LR, "--parametrizations", "ntk"], untouched, "--parametrizations: 'ntk'"),
    "a seed twice": ([*LR, "--seeds", "1,1"], untouched, "--seeds: not a list of different"),
    "a seed below 0": ([*LR, "--seeds", "-1"], untouched, "training.seed"),
    "no length": ([*LR, "--tokens-per-parameter", "0"], untouched, "--tokens-per-parameter: 0.0 is not"),
    "no workers": ([*LR, "--workers", "0"], untouched, "--workers: 0 is no number"),
    "devices left over": ([*LR, "--workers", "2", "--devices", "0,1,2"], untouched, "--devices: 3 devices"),
    "an open quote": ([*LR, "--launcher", "a 'b"], untouched, "--launcher: No closing quotation"),
    "no such launcher": ([*LR, "--launcher", "no-such-command"], untouched, "--launcher: no command"),
    "no rate": ([*LR, "--flops-per-second", "nan"], untouched, "--flops-per-second: nan is no rate"),
    "a folder in the way": (LR, full, "out: the output exists already"),
    "below a file": ([*LR, "--output", "a-file/x"], untouched, "a-file/x: cannot be written"),
    "wsd: all decay": ([*WSD, "--shares", "1"], untouched, "--shares: not different shares below 1"),
    "wsd: no end": ([*WSD, "--ends", "0.5"], untouched, "--ends: not different shares of which 1 is"),
    "wsd: equal decays": ([*WSD, "--shares", "0.01,0.02"], untouched, "--shares: two of them are 1 of 12 steps"),
    "wsd: decay in the warmup": ([*WSD, "--shares", "0.9"], untouched, "begins in the warmup"),
    "wsd: end in the warmup": ([*WSD, "--ends", "0.1,1"], untouched, "--ends: 0.1 of 12 steps ends in the warmup"),
    "decay-study: too short": ([*STUDY, "schedule.total=12"], untouched, "--interval: a decay of 5 of 12 steps has 2"),
    "decay-study: no window": ([*STUDY, "--decay-share", "0.5"], untouched, "--decay-share: 0.5 leaves no window"),
    "wsd: unknown shape": ([*WSD, "--shapes", "steep"], untouched, "schedule.decay_shape"),
    "wsd: odd lengths": (
        [*WSD, "schedule.total=401", "--ends", "0.5,1"],
        untouched,
        "--ends: only evaluations every",
    ),
    "law: no tokenizer": ([*LAW, "data.tokenizer=null"], untouched, "loss per byte needs the bytes"),
    "batch: three": ([*BATCH, "--batches", "64,128,256"], untouched, "--batches: not a list of at least 4 different"),
    "batch: half a sample": ([*BATCH, "--batches", "32,64,128,144"], untouched, "--batches: 144 tokens are no whole"),
    "batch: no tokens": ([*BATCH, "--tokens", "nan"], untouched, "--tokens: nan is no amount of tokens"),
    "batch: too short": ([*BATCH, "--tokens", "600"], untouched, "--tokens: 600 tokens are 1 evaluations after"),
    "batch: no curve": ([*BATCH, "--evaluations", "3"], untouched, "--evaluations: 3 make no curve"),
    "batch: a loss of nothing": ([*BATCH, "--predict", "0"], untouched, "--predict: not a list of positive"),
    "batch: one contour": ([*BATCH, "--contours", "1"], untouched, "--contours: 1 are too few"),
    "batch: nothing held out": ([*BATCH, "data.validation={}"], untouched, "data.validation: the experiment compares"),
    "batch: samples that grow": (
        [*BATCH, "data.curriculum=[{until: 4, sequence_length: 16}]"],
        untouched,
        "data.curriculum: the loss of shorter",
    ),
    "envelope: three sizes": ([*ENVELOPE, "--sizes", "32x1,32x2,32x3"], untouched, "--sizes: not one size, or a small"),
    "envelope: upside down": (
        [*ENVELOPE, "--sizes", "32x2,32x1", "--large-tokens-per-parameter", "10"],
        untouched,
        "--sizes: 32x1 has 11,872 parameters and 32x2 23,712: the large one is not larger",
    ),
    "envelope: few points": ([*ENVELOPE, "--points", "5"], untouched, "--points: 5 decays are too few"),
    "envelope: falling": ([*ENVELOPE, "--tokens-per-parameter", "60,10"], untouched, "--tokens-per-parameter: not two"),
    "envelope: no large one": (
        [*ENVELOPE, "--large-tokens-per-parameter", "0"],
        untouched,
        "--large-tokens-per-parameter: not different positive",
    ),
    "envelope: equal lengths": (
        [*ENVELOPE, "--large-tokens-per-parameter", "20,20.0001"],
        untouched,
        "--large-tokens-per-parameter: points of 32x2",
    ),
    "envelope: all decay": ([*ENVELOPE, "--decay-share", "1"], untouched, "--decay-share: 1 is no share"),
    "envelope: a seed twice": ([*ENVELOPE, "--seeds", "1,1"], untouched, "--seeds: not a list of different"),
    "search: no trials": ([*SEARCH, "--trials", "0"], untouched, "--trials: 0 is no number of trials"),
    "search: fewer than no seeds": ([*SEARCH, "--repeats", "-1"], untouched, "--repeats: -1 is no number"),
    "search: a negative seed": ([*SEARCH, "--seed", "-1"], untouched, "--seed: -1 is below 0"),
    "search: one end": ([*SEARCH, "--rate", "0.01"], untouched, "--rate: '0.01' is no range"),
    "search: a range in words": ([*SEARCH, "--scale-emb", "low,high"], untouched, "--scale-emb: 'low,high' is not"),
    "search: falling": ([*SEARCH, "--init-std", "0.2,0.05"], untouched, "--init-std: not two positive numbers"),
    "search: from nothing": ([*SEARCH, "--scale-depth", "0,2"], untouched, "--scale-depth: not two positive"),
    "search: without the paper's": (
        [*SEARCH, "--rate", "0.02,0.1"],
        untouched,
        "--rate: 0.02 to 0.1 leaves the paper's 0.01 out",
    ),
    "search: no size": ([*SEARCH, "--size", "32"], untouched, "--size: '32' is no size"),
    "search: no heads": ([*SEARCH, "--size", "40x1"], untouched, "40 does not divide into heads of 16"),
    "search: no length": (
        [*SEARCH, "--tokens-per-parameter", "0"],
        untouched,
        "--tokens-per-parameter: 0.0 is not positive",
    ),
    "law: two sizes": ([*LAW, "--sizes", "32x1,32x2"], untouched, "--sizes: not a list of at least 3"),
    "law: one point": ([*LAW, "--points", "1"], untouched, "--points: 1 of 3 sizes are too few"),
    "law: falling": ([*LAW, "--tokens-per-parameter", "60,10"], untouched, "--tokens-per-parameter: not two"),
    "law: in the warmup": ([*LAW, "--tokens-per-parameter", "0.01,1"], untouched, "begins in the 2 steps of warmup"),
    "law: equal points": ([*LAW, "--tokens-per-parameter", "0.1,0.101"], untouched, "not all different"),
    "law: all decay": ([*LAW, "--decay-share", "1"], untouched, "--decay-share: 1 is no share"),
    "law: unknown shape": ([*LAW, "--shape", "steep"], untouched, "schedule.decay_shape"),
    "law: no compute": ([*LAW, "--compute", "-1"], untouched, "--compute: -1.0 FLOPs are no compute"),
    "report: nothing there": (REPORT, untouched, "out: no results"),
    "report: damaged": (REPORT, results("{"), "results.json: cannot be read as JSON"),
    "report: something else": (REPORT, results("[]"), "results.json: not of the form"),
    "report: no fields": (REPORT, results(json.dumps({"format": "x"})), "results.json: not of the form"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_line(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments, spoil, message = MISTAKES[name]
    spoil(here)
    before = tree(here)
    capfd.readouterr()
    assert command("windtunnel.py", *arguments) == 2
    error = capfd.readouterr().err
    [line] = error_lines(error)
    assert message in line and len(line) < 400 and "Traceback" not in error
    assert tree(here) == before


@pytest.mark.parametrize("subcommand", [*sorted(EXPERIMENTS), "fit", "tokens-per-size", "report", "all"])
def test_each_subcommand_explains_itself(subcommand: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("windtunnel.py", subcommand, "--help") == 0
    assert f"windtunnel.py {subcommand}" in capsys.readouterr().out
