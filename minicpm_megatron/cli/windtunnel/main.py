"""The parser of tools/windtunnel.py, made of those of its subcommands."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.windtunnel import (
    batches,
    coordinates,
    decay_study,
    decays,
    envelope,
    everything,
    fit,
    rates,
    report,
    scaling_law,
    search,
    tokens_per_size,
)
from minicpm_megatron.cli.windtunnel.options import Run
from minicpm_megatron.windtunnel.experiment import Ended

DESCRIPTION = """The paper's experiments (arXiv 2404.06395, sections 3 and 4) on models as small as your machine wants.

  python tools/windtunnel.py lr --recipe R.yaml --sizes 64x4,128x6 --output runs/lr --dry-run
  python tools/windtunnel.py lr --recipe R.yaml --sizes 64x4,128x6 --output runs/lr --workers 2
  python tools/windtunnel.py scaling-law --recipe R.yaml --sizes 64x4,128x6,256x8 --output runs/law
  python tools/windtunnel.py fit --csv losses.csv
  python tools/windtunnel.py tokens-per-size --csv curves.csv
  python tools/windtunnel.py report --runs runs/lr runs/wsd --output runs/report.html
  python tools/windtunnel.py all --plan examples/windtunnel/cpu.yaml --output runs/windtunnel

Every experiment is made of runs of examples/train.py with your recipe and overrides. Killed or stopped, the same
command goes on where it was; started several times on a shared folder, on one machine or many, the runs are divided
between the starts. docs/windtunnel.md says what each measures and where it stands in the paper."""

SUBCOMMANDS = (
    rates,
    batches,
    search,
    decays,
    decay_study,
    coordinates,
    scaling_law,
    envelope,
    fit,
    tokens_per_size,
    report,
)
STATUS: dict[Ended, int] = {"done": 0, "stopped": 0, "failed": 1}


def parser() -> argparse.ArgumentParser:
    """The parser; `--help` of each subcommand is its documentation."""
    result: argparse.ArgumentParser = Parser(description=DESCRIPTION)
    commands = result.add_subparsers(dest="command", required=True, metavar="SUBCOMMAND")
    for module in SUBCOMMANDS:
        module.add(commands)
    everything.add(commands, parse)
    return result


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Options of the command line.

    Raises:
        UserError: an argument is unknown, missing or cannot be read.
    """
    command = parser()
    options, left = command.parse_known_args(arguments)
    # overrides that stand apart; argparse itself takes only those that stand together
    if left and ("overrides" not in options or any(word.startswith("-") for word in left)):
        command.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        options.overrides += left
    return options


def main(script: Path, arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 where a run has failed.

    Args:
        script: examples/train.py, which trains the cells.

    Raises:
        UserError: the input is wrong.
    """
    options = parse(arguments)
    run: Run = options.run
    return STATUS[run(options, script)]
