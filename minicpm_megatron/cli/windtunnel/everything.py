"""`minicpm windtunnel all`: the experiments of a plan, one after the other, and their report."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minicpm_megatron.cli.windtunnel.options import (
    Subparsers,
    add_launch_options,
    planned,
    say,
)
from minicpm_megatron.errors import UserError
from minicpm_megatron.recipe import yaml_text
from minicpm_megatron.training.metrics import human
from minicpm_megatron.windtunnel.experiment import Ended, Experiment
from minicpm_megatron.windtunnel.report.facts import find_results
from minicpm_megatron.windtunnel.report.page import write_page
from minicpm_megatron.windtunnel.results import RESULTS

Parse = Callable[[Sequence[str]], argparse.Namespace]
PAGES = ("report.html", "report.md")
DESCRIPTION = """Run the experiments of a plan, one after the other, and write DIR/report.html and DIR/report.md.

The plan is a YAML file: `recipe`, and under `experiments` one entry an experiment, whose name is its folder in DIR:

  recipe: examples/windtunnel/windtunnel-cpu.yaml
  experiments:
    lr: {sizes: [64x4, 128x6], seeds: [1, 2]}
    wsd-long: {command: wsd, seeds: [1, 2], overrides: [schedule.total=400]}

Keys are the options of the subcommand (`command`, or the name of the entry); `overrides` may also stand beside
`recipe`, for all. All entries are checked before the first one starts. An experiment of which a run fails does not
keep the others from being run. Started again, it goes on."""


@dataclass(frozen=True)
class Entry:
    """One experiment of a plan: its name, its options, and what they ask for."""

    name: str
    options: argparse.Namespace
    experiment: Experiment


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "all",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.add_argument("--plan", type=Path, required=True, metavar="FILE", help="YAML file of experiments")
    command.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of their folders")
    command.add_argument("--recipe", metavar="FILE", help="in place of the plan's recipe")
    command.add_argument("--only", metavar="NAME,...", help="these experiments of the plan (default: all)")
    command.add_argument("--dry-run", action="store_true", help="print what each takes and what all take, and exit")
    add_launch_options(command)
    command.set_defaults(run=_run_all)


def _run_all(options: argparse.Namespace, script: Path) -> Ended:
    from minicpm_megatron.cli.windtunnel.main import parse  # which imports this module to make the parser

    entries = _read_plan(options, parse)
    if options.dry_run:
        for entry in entries:
            say(f"== {entry.name}")
            entry.options.run(entry.options, script)
        say(f"== all: {_total([entry.experiment for entry in entries])}")
        return "done"
    say(_total([entry.experiment for entry in entries]))
    ended: list[Ended] = []
    for number, entry in enumerate(entries, start=1):
        say(f"== {entry.name} ({number} of {len(entries)})")
        try:
            ended.append(entry.options.run(entry.options, script))
        except UserError as error:  # the others can still be run: nobody may be there to start them again
            say(f"failed: {entry.name}: {error}")
            ended.append("failed")
        if ended[-1] == "stopped":
            return "stopped"
        _write_report(options.output, entries)
    return "failed" if "failed" in ended else "done"


def _write_report(output: Path, entries: Sequence[Entry]) -> None:
    with_results = [entry.options.output for entry in entries if (entry.options.output / RESULTS).exists()]
    if not with_results:
        return
    found = find_results(with_results)
    for page in PAGES:
        write_page(found, output / page)
    say(f"report: {output / PAGES[0]}")


def _read_plan(options: argparse.Namespace, parse: Parse) -> list[Entry]:
    path: Path = options.plan
    plan = yaml_text.read(path, "the plan").value
    form = "a plan has `recipe`, a path, and `experiments`, a mapping of names; see --help"
    if (
        not isinstance(plan, dict)
        or set(plan) - {"overrides"} != {"recipe", "experiments"}
        or not isinstance(plan["recipe"], str)
    ):
        raise UserError("not a plan", where=str(path), fix=form)
    given = plan["experiments"]
    if not isinstance(given, dict) or not given or not all(isinstance(each, dict) for each in given.values()):
        raise UserError("not a mapping of experiments", where=f"{path}: experiments", fix=form)
    names = list(given) if options.only is None else options.only.split(",")
    for name in names:
        if name not in given or Path(name).name != name:
            raise UserError(f"no experiment {name!r} of a plan", where=str(path), fix=f"it has {', '.join(given)}")
    return [_entry(name, given[name], plan, options, parse) for name in names]


def _entry(name: str, values: dict[str, Any], plan: dict[str, Any], options: argparse.Namespace, parse: Parse) -> Entry:
    rest = dict(values)
    recipe = options.recipe or plan["recipe"]
    words = [str(rest.pop("command", name)), "--recipe", recipe, "--output", str(options.output / name)]
    overrides = [plan.get("overrides", []), rest.pop("overrides", [])]
    for key, value in rest.items():
        words.append(f"--{key}={','.join(map(str, value)) if isinstance(value, list) else value}")
    try:
        if not all(isinstance(each, list) for each in overrides):
            raise UserError("overrides are not a list", fix="write [section.key=value, ...]")
        found = parse(words + [str(each) for part in overrides for each in part])
        if "plan" not in found:
            raise UserError(f"{words[0]} is no experiment")
        for key in ("workers", "launcher", "devices", "flops_per_second"):
            setattr(found, key, getattr(options, key))
        found.dry_run = options.dry_run
        return Entry(name, found, planned(found))
    except UserError as error:
        raise UserError(f"{error}", where=f"{options.plan}: {name}") from None


def _total(experiments: Sequence[Experiment]) -> str:
    runs, tokens, flops = map(sum, zip(*(each.costs() for each in experiments), strict=True))
    return f"{len(experiments)} experiments, {runs} runs, {tokens:,} tokens, {human(flops)}FLOPs"
