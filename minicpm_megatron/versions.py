"""The one line of versions that is supported, checked where a command starts.

megatron-core renames its parts from one minor version to the next. This module refuses versions that the tests do not
run on with one line, before an import fails somewhere inside them.
"""

from __future__ import annotations

import sys
from importlib import metadata

from minicpm_megatron.errors import UserError

PYTHON = (3, 12)
MEGATRON_CORE = "0.19"
ADVICE = f"use Python {PYTHON[0]}.{PYTHON[1]} with megatron-core {MEGATRON_CORE} (requirements.txt has the pins)"


def check_versions(python: tuple[int, int] | None = None, megatron: str | None = None) -> None:
    """Refuse a Python or a megatron-core that is not supported.

    Args:
        python: (major, minor), default the running one.
        megatron: version of megatron-core, default the installed one.

    Raises:
        UserError: megatron-core is not installed, or one of them is not supported.
    """
    python = python or sys.version_info[:2]
    if python != PYTHON:
        raise UserError(f"Python {python[0]}.{python[1]} is not supported", where=sys.executable, fix=ADVICE)
    try:
        megatron = megatron or metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise UserError("megatron-core is not installed", where=sys.executable, fix=ADVICE) from None
    if megatron.split(".")[:2] != MEGATRON_CORE.split("."):
        raise UserError(f"megatron-core {megatron} is not supported", where=sys.executable, fix=ADVICE)
