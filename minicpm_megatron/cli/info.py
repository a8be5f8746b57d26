"""Print what a report of a fault needs: versions of the libraries, and the machine."""

from __future__ import annotations

import platform
from collections.abc import Sequence

from minicpm_megatron import __version__
from minicpm_megatron.cli.arguments import Parser
from minicpm_megatron.cli.interrupts import leaving_at_once
from minicpm_megatron.storage.manifest import library_versions


def parser() -> Parser:
    """Return the parser; `--help` is its documentation."""
    return Parser(description=__doc__)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print one line a library, then the machine."""
    parser().parse_args(arguments)
    with leaving_at_once():  # torch, to ask for GPUs: seconds
        from minicpm_megatron.windtunnel.machine import describe_machine

        machine = describe_machine()
    versions = {"python": platform.python_version(), **library_versions(), "minicpm_megatron": __version__}
    rows = [*versions.items(), ("system", platform.platform()), ("machine", machine)]
    print("\n".join(f"{name:<20}{value}" for name, value in rows))
