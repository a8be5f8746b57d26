"""`minicpm windtunnel fit`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm_megatron.cli.windtunnel.options import Subparsers, add_law_options, parse_compute
from minicpm_megatron.windtunnel.experiment import Ended
from minicpm_megatron.windtunnel.law.fit_csv import fit_csv
from minicpm_megatron.windtunnel.results import format_results


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "fit",
        description="Fit L(N, D) = C_N N^-alpha + C_D D^-beta + L0 to losses of any origin, one held-out set after the"
        " other and their mean, with 95 % limits by bootstrap, beside the paper's average.",
    )
    command.add_argument(
        "--csv",
        type=Path,
        required=True,
        metavar="FILE",
        help="a line a checkpoint: n (parameters without embeddings), d (tokens), loss, and set where there are several"
        " held-out sets; absolute numbers, not billions",
    )
    add_law_options(command)
    command.add_argument("--output", type=Path, help="folder for results.json and pictures (default: print only)")
    command.set_defaults(run=_fit)


def _fit(options: argparse.Namespace, script: Path) -> Ended:
    results = fit_csv(options.csv, options.method, parse_compute(options.compute), options.output)
    print(format_results(results, options.output))
    return "done"
