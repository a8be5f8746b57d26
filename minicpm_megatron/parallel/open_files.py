"""The number of files that a process may open at once; a socket to another rank is one of them."""

from __future__ import annotations

import contextlib
import resource

from minicpm_megatron.errors import UserError

FEWEST = 256  # a single rank has about 100 open; near the limit gloo fails with errors that do not name it


def allow_many() -> None:
    """Raise this process's limit as far as it may without asking anyone (the hard limit).

    Raises:
        UserError: that is less than a rank needs.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # the kernel's own limit may be lower
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    if most != resource.RLIM_INFINITY and most < FEWEST:
        raise too_few()


def too_few() -> UserError:
    """What to raise where the limit was met."""
    may, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return UserError(f"{may} open files are too few for a process", where="ulimit -n", fix="allow more: ulimit -n 4096")
