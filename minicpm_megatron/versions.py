"""Which Python goes with which megatron-core, checked where a command starts.

megatron-core publishes for Python 3.11 up to 0.16, and from 0.17 on for Python 3.12. Other pairs are refused with one
line, before an import fails somewhere inside them.
"""

from __future__ import annotations

import sys
from importlib import metadata

from minicpm_megatron.errors import UserError

# Python (major, minor) -> megatron-core (first, last) minor versions of 0.x
SUPPORTED = {(3, 11): (16, 16), (3, 12): (17, 19)}
ADVICE = "use Python 3.11 with megatron-core 0.16, or Python 3.12 with megatron-core 0.17 to 0.19"


def check_versions(python: tuple[int, int] | None = None, megatron: str | None = None) -> None:
    """Refuse an unsupported pair of Python and megatron-core.

    Args:
        python: (major, minor), default the running one.
        megatron: version of megatron-core, default the installed one.

    Raises:
        UserError: megatron-core is not installed, or the pair is not supported.
    """
    python = python or sys.version_info[:2]
    if python not in SUPPORTED:
        raise UserError(f"Python {python[0]}.{python[1]} is not supported", where=sys.executable, fix=ADVICE)
    try:
        megatron = megatron or metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise UserError("megatron-core is not installed", where=sys.executable, fix=ADVICE) from None
    first, last = SUPPORTED[python]
    release = megatron.split(".")
    if release[0] != "0" or not release[1].isdigit() or not first <= int(release[1]) <= last:
        raise UserError(
            f"megatron-core {megatron} is not supported on Python {python[0]}.{python[1]}",
            where=sys.executable,
            fix=ADVICE,
        )
