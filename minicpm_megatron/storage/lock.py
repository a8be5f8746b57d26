"""One process at a time in a folder, by a lock that the kernel drops when its holder dies, however it dies."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from pathlib import Path
from typing import BinaryIO

from minicpm_megatron.errors import UserError

log = logging.getLogger(__name__)
LOCK = ".lock"
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


def hold_if_free(directory: Path) -> BinaryIO | None:
    """Make `directory` and take its lock as `hold` does; None where another process holds it.

    Raises:
        UserError: the folder cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        return hold(directory)
    except OSError as error:
        raise UserError(f"cannot be written: {error.strerror}", where=str(directory)) from None
    except UserError:
        return None


def hold(directory: Path) -> BinaryIO:
    """Take the lock of `directory`; it is held until the returned file is closed or the process ends.

    A file system without locks gives a warning and no protection.

    Raises:
        UserError: another process holds it.
        OSError: the folder cannot be written.
    """
    handle = open(directory / LOCK, "a+b")
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        handle.seek(0)
        holder = handle.read(20).decode(errors="replace").strip()
        handle.close()
        raise UserError(
            f"in use by another process ({holder})",
            where=str(directory),
            fix="wait until it has saved and stopped, or give this run another name",
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("%s: this file system has no locks; do not start the same run twice", directory)
    handle.truncate(0)
    handle.write(f"pid {os.getpid()}".encode())
    handle.flush()
    return handle
