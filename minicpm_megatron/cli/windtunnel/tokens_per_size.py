"""`minicpm windtunnel tokens-per-size`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm_megatron.cli.windtunnel.options import Subparsers
from minicpm_megatron.windtunnel.experiment import Ended
from minicpm_megatron.windtunnel.results import format_results
from minicpm_megatron.windtunnel.tokens_per_size import tokens_per_size


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "tokens-per-size",
        description="Fill the concave part of each size's loss curve with a straight line in log-log, as if WSD had"
        " been used, and say at which tokens a parameter the next larger size takes over.",
    )
    command.add_argument(
        "--csv",
        type=Path,
        required=True,
        metavar="FILE",
        help="a line a point of a curve: n (parameters), d (tokens), loss, and set where there are several; absolute"
        " numbers, not billions",
    )
    command.add_argument("--output", type=Path, help="folder for results.json and the picture (default: print only)")
    command.set_defaults(run=_run)


def _run(options: argparse.Namespace, script: Path) -> Ended:
    print(format_results(tokens_per_size(options.csv, options.output), options.output))
    return "done"
