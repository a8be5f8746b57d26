"""tools/windtunnel.py all: experiments of a plan, stopped and gone on with, and their report."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import load_recipe, yaml_text
from minicpm_megatron.windtunnel.report.facts import facts, find_results
from minicpm_megatron.windtunnel.report.html_page import format_html
from minicpm_megatron.windtunnel.report.markdown import format_markdown
from minicpm_megatron.windtunnel.results import RESULTS, Finding, Picture, Results, Table, read_results, write_results
from tests.cli.commands import ROOT, command, error_lines, tree
from tests.windtunnel.subcommands import EXPERIMENTS
from tests.windtunnel.warm import WarmTrainer

PLAN = """\
recipe: recipe.yaml
experiments:
  rates:
    {command: lr, sizes: [32x1], rates: [0.004, 0.008, 0.016], parametrizations: mup, overrides: [schedule.total=6]}
  coord-check: {widths: [32, 64], depths: "", layers: 1, steps: 1}
"""
ALL = ["all", "--plan", "plan.yaml", "--output", "out"]
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)


class Page(HTMLParser):
    """What a browser would fetch, run and show of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.shown: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [value or "" for key, value in attrs if key in ("src", "href", "srcset", "data")]

    def handle_data(self, data: str) -> None:
        self.shown.append(data)


def test_experiments_of_a_plan_and_their_report(
    here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "plan.yaml").write_text(PLAN)
    before = tree(here)
    assert command("windtunnel.py", *ALL, "--dry-run") == 0
    planned = capsys.readouterr().out
    assert "== all: 2 experiments, 7 runs" in planned and tree(here) == before

    assert command("windtunnel.py", *ALL, "--launcher", warm.launcher) == 0
    text = capsys.readouterr().out
    assert "== rates (1 of 2)" in text and "report: out/report.html" in text
    starts = len(warm.starts(here / "out" / "rates"))
    page = Page((here / "out" / "report.html").read_text())
    found = [read_results(here / "out" / name) for name in ("rates", "coord-check")]
    shown = "\n".join(page.shown)
    for results in found:
        assert results.machine and results.machine in shown
        assert all(text in shown for finding in results.findings for text in (finding.claim, finding.ours))
        assert all(cell["name"] in shown for cell in results.cells)
    pictures = [source for source in page.sources if not source.startswith("#")]
    assert len(pictures) == sum(len(results.pictures) for results in found) > 1
    first = (here / "out" / "rates" / found[0].pictures[0].file).read_bytes()
    assert base64.b64decode(pictures[0].removeprefix("data:image/png;base64,")) == first
    assert "](rates/rates.png)" in (here / "out" / "report.md").read_text()

    assert command("windtunnel.py", *ALL, "--launcher", warm.launcher, "--only", "rates") == 0
    assert "3 of 3 cells are done already" in capsys.readouterr().out
    assert len(warm.starts(here / "out" / "rates")) == starts


def test_every_command_runs_unattended(here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]) -> None:
    plan = ["all", "--plan", str(ROOT / "examples" / "windtunnel" / "smoke.yaml"), "--recipe", "recipe.yaml"]
    assert command("windtunnel.py", *plan, "--output", "out", "--launcher", warm.launcher, "--workers", "2") == 0
    text = capsys.readouterr().out
    found = find_results([here / "out"])
    assert {results.kind for _, results in found} == EXPERIMENTS
    assert {cell["state"] for _, results in found for cell in results.cells} == {"done"}
    page = Page((here / "out" / "report.html").read_text())
    shown = "\n".join(page.shown)
    assert all(results.title in shown and results.title in text for _, results in found)
    assert len([source for source in page.sources if source.startswith("data:")]) == page.tags.count("img") > 8


@pytest.mark.parametrize("name", ["cpu", "smoke"])
def test_an_example_has_every_experiment_on_a_recipe_that_is_there(name: str) -> None:
    plan = yaml_text.read(ROOT / "examples" / "windtunnel" / f"{name}.yaml", "the plan").value
    assert {str(each.get("command", key)) for key, each in plan["experiments"].items()} == EXPERIMENTS
    recipe = load_recipe(ROOT / plan["recipe"], plan.get("overrides", []))
    assert recipe.data.validation


def test_an_experiment_that_fails_does_not_keep_the_next(
    here: Path, warm: WarmTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    (here / "plan.yaml").write_text(PLAN)
    (here / "out" / "rates").mkdir(parents=True)
    (here / "out" / "rates" / "mine").write_text("x")
    assert command("windtunnel.py", *ALL, "--launcher", warm.launcher) == 1
    text = capsys.readouterr().out
    assert "failed: rates: out/rates: the output exists already" in text
    assert [folder.name for folder, _ in find_results([here / "out"])] == ["coord-check"]
    assert (here / "out" / "report.html").exists()


MISTAKES: dict[str, tuple[str | bytes, str]] = {
    "no mapping": ("[1]", "plan.yaml: not a plan"),
    "no recipe": ("experiments: {}", "plan.yaml: not a plan"),
    "another key": (PLAN + "more: 1\n", "plan.yaml: not a plan"),
    "no experiments": ("recipe: recipe.yaml\nexperiments: {}", "experiments: not a mapping of experiments"),
    "no options": ("recipe: recipe.yaml\nexperiments: {lr: 3}", "experiments: not a mapping of experiments"),
    "an unknown subcommand": (
        "recipe: recipe.yaml\nexperiments: {fly: {}}",
        "plan.yaml: fly: windtunnel: no subcommand 'fly'",
    ),
    "no experiment": (
        "recipe: recipe.yaml\nexperiments: {report: {runs: a}}",
        "plan.yaml: report: windtunnel.py: unrecognized arguments: --recipe",
    ),
    "an unknown option": (PLAN.replace("widths", "width-s"), "coord-check: windtunnel.py: unrecognized arguments"),
    "a value that is refused": (
        PLAN.replace("32x1", "32x0"),
        "plan.yaml: rates: --sizes: '32x0' is no size; give WIDTHxLAYERS",
    ),
    "no such recipe": (PLAN.replace("recipe.yaml", "no.yaml"), "plan.yaml: rates: no.yaml: cannot read the recipe"),
    "overrides": (PLAN.replace("[schedule.total=6]", "a"), "plan.yaml: rates: overrides are not a list"),
    "a folder outside": ('recipe: recipe.yaml\nexperiments: {"../lr": {}}', "no experiment '../lr' of a plan"),
    "no YAML": ("recipe: [", "plan.yaml:1"),
    "no text": (b"\xff\xfe", "plan.yaml: not UTF-8 text"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_each_mistake_is_one_line_and_nothing_starts(name: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = MISTAKES[name]
    (here / "plan.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    before = tree(here)
    capfd.readouterr()
    assert command("windtunnel.py", *ALL) == 2
    error = capfd.readouterr().err
    [line] = error_lines(error)
    assert message in line and "Traceback" not in error
    assert tree(here) == before


def made(folder: Path, **changes: object) -> Results:
    """Results whose texts are hostile, written into `folder`."""
    folder.mkdir()
    (folder / "a.png").write_bytes(PIXEL)
    values: dict[str, object] = {
        "kind": "lr",
        "title": "<script>alert(1)</script>",
        "settings": {"sizes": [[64, 4], [128, 6]], "rates": [0.01, 1e-5], "unset": None},
        "recipe": "0" * 64,
        "data": {"tokens": "1" * 64},
        "versions": {"torch": "2"},
        "findings": (Finding("a | b", "<b>1</b>", "2 & 3", True), Finding("c", "1", "2", "undecided")),
        "tables": (Table("t", ("x|y", "z"), (("<i>", "1"),)),),
        "pictures": (Picture("a.png", '"quoted"'),),
        "cells": (
            {
                "name": "c",
                "state": "done",
                "parameters": 10,
                "tokens": 5,
                "flops": 300.0,
                "seconds": 2.0,
                "held_out": None,
                "losses": {},
                "labels": {},
            },
        ),
        "machine": "1 core",
    } | changes
    results = Results(**values)  # type: ignore[arg-type]
    write_results(results, folder)
    return results


def test_text_of_results_is_never_markup(tmp_path: Path) -> None:
    results = made(tmp_path / "one")
    page = Page(format_html([(tmp_path / "one", results)]))
    assert not {"script", "b", "i"} & set(page.tags)
    shown = "\n".join(page.shown)
    assert "<script>alert(1)</script>" in shown and "<b>1</b>" in shown and "2 claims: 1 agree, 0 disagree" in shown
    assert [source for source in page.sources if not source.startswith(("#", "data:image/png;base64,"))] == []
    rows = [line for line in format_markdown([(tmp_path / "one", results)], tmp_path).splitlines() if "a \\| b" in line]
    assert rows == ["| lr | a \\| b | <b>1</b> | 2 & 3 | agrees |"]


def test_no_flipped_bit_of_results_is_a_traceback(tmp_path: Path) -> None:
    made(tmp_path / "one")
    path = tmp_path / "one" / RESULTS
    whole, refused = path.read_bytes(), 0
    for place in range(len(whole)):
        damaged = bytearray(whole)
        damaged[place] ^= 1 << place % 7
        path.write_bytes(damaged)
        try:
            found = find_results([tmp_path / "one"])
            format_markdown(found, tmp_path)
            format_html(found)
        except UserError as error:
            refused += 1
            assert str(tmp_path) in str(error)
    assert 0 < refused < len(whole), "in a text or a number it cannot be known"


def test_facts_say_what_was_run_and_on_what(tmp_path: Path) -> None:
    told = dict(facts(made(tmp_path / "one")))
    assert told["asked for"] == "sizes 64x4 128x6, rates 0.01 1e-05"
    assert told["runs"].startswith("1 done; 10 to 10 parameters without embeddings; 5 tokens; 300 FLOPs; ")
    assert told["tokens"] == "tokens 111111111111" and told["machine"] == "1 core"


def spoil_picture(folder: Path) -> None:
    (folder / "one" / "a.png").unlink()


REPORTS: dict[str, tuple[list[str], Callable[[Path], object], str]] = {
    "another kind of page": (["--output", "page.pdf"], lambda folder: None, "page.pdf: not a page that can be written"),
    "no such folder": (["--output", "no/page.html"], lambda folder: None, "no/page.html: cannot be written"),
    "twice": (["one", "--output", "page.html"], lambda folder: None, "one: given twice"),
    "no picture": (["--output", "page.html"], spoil_picture, "one/a.png: picture cannot be read"),
}


@pytest.mark.parametrize("name", REPORTS)
def test_each_mistake_of_report_is_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments, spoil, message = REPORTS[name]
    made(tmp_path / "one")
    spoil(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    assert command("windtunnel.py", "report", "--runs", ".", *arguments) == 2
    [line] = error_lines(capfd.readouterr().err)
    assert message in line
    assert tree(tmp_path) == before


def test_results_of_an_older_form_can_still_be_read(tmp_path: Path) -> None:
    made(tmp_path / "one")
    path = tmp_path / "one" / "results.json"
    content = json.loads(path.read_text())
    del content["machine"]
    path.write_text(json.dumps(content))
    assert read_results(tmp_path / "one").machine == ""
