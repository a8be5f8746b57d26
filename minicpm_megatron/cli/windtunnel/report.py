"""`minicpm windtunnel report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm_megatron.cli.windtunnel.options import Subparsers
from minicpm_megatron.windtunnel.experiment import Ended
from minicpm_megatron.windtunnel.report.facts import find_results
from minicpm_megatron.windtunnel.report.page import write_page
from minicpm_megatron.windtunnel.results import format_results


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "report",
        description="Read results.json of experiments that have ended; nothing is run or measured again.",
    )
    command.add_argument(
        "--runs", type=Path, nargs="+", required=True, help="folders of experiments, or a folder with such folders"
    )
    command.add_argument(
        "--output", type=Path, help="page to write: .html (one file, pictures inside) or .md (links to the pictures)"
    )
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace, script: Path) -> Ended:
    found = find_results(options.runs)
    if options.output is None:
        print("\n\n".join(format_results(results, folder) for folder, results in found))
        return "done"
    write_page(found, options.output)
    print(f"report: {options.output}")
    return "done"
