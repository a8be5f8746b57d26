"""`tools/windtunnel.py report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm_megatron.cli.windtunnel.options import Subparsers
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.windtunnel.results import format_markdown, format_results, read_results


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "report",
        help="print what experiments found, or write it as one page",
        description="Read results.json of experiments that have ended; nothing is run or measured again.",
    )
    command.add_argument("--runs", type=Path, nargs="+", required=True, help="folders of experiments")
    command.add_argument("--output", type=Path, help="Markdown page to write (.md)")
    command.set_defaults(run=_report)


def _report(options: argparse.Namespace, script: Path) -> int:
    found = [(folder, read_results(folder)) for folder in options.runs]
    if options.output is None:
        print("\n\n".join(format_results(results, folder) for folder, results in found))
        return 0
    if not options.output.resolve().parent.is_dir() or options.output.is_dir():
        raise UserError("cannot be written", where=str(options.output), fix="give a file in a folder that exists")
    write_bytes(options.output, format_markdown(found, options.output.parent).encode())
    print(f"report: {options.output}")
    return 0
