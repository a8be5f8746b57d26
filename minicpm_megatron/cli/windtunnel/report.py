"""`tools/windtunnel.py report`."""

from __future__ import annotations

import argparse
from pathlib import Path

from minicpm_megatron.cli.windtunnel.options import Subparsers
from minicpm_megatron.errors import UserError
from minicpm_megatron.storage.atomic import write_bytes
from minicpm_megatron.windtunnel.experiment import Ended
from minicpm_megatron.windtunnel.report.facts import find_results
from minicpm_megatron.windtunnel.report.html_page import format_html
from minicpm_megatron.windtunnel.report.markdown import format_markdown
from minicpm_megatron.windtunnel.results import format_results

PAGES = (".html", ".md")


def add(commands: Subparsers) -> None:
    """Add the subcommand."""
    command = commands.add_parser(
        "report",
        help="print what experiments found, or write it as one page",
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
    if options.output.suffix not in PAGES:
        raise UserError("not a page that can be written", where=str(options.output), fix="end it in .html or .md")
    if not options.output.resolve().parent.is_dir() or options.output.is_dir():
        raise UserError("cannot be written", where=str(options.output), fix="give a file in a folder that exists")
    page = format_html(found) if options.output.suffix == ".html" else format_markdown(found, options.output.parent)
    write_bytes(options.output, page.encode())
    print(f"report: {options.output}")
    return "done"
