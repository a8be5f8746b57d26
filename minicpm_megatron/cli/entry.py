"""How every public command ends: 0 done, 2 the user's input was wrong, 1 anything else."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
from collections.abc import Callable

from minicpm_megatron.cli.interrupts import EXIT_INTERRUPTED, clean_up_first, say_interrupted
from minicpm_megatron.cli.library_lines import only_our_lines
from minicpm_megatron.errors import UserError
from minicpm_megatron.parallel.open_files import too_few

EXIT_USER_ERROR = 2
RANK_0_GRACE = 15.0  # seconds; ranks of a busy machine start seconds apart


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process with the exit status its outcome stands for.

    A `UserError` becomes one line on standard error. Under a launcher every rank usually meets the same mistake, so
    rank 0 speaks; the others leave it the time to, and then speak for themselves, because a mistake can be one
    machine's alone.
    """
    clean_up_first()
    only_our_lines()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # a path or a text that the terminal has no characters for must not end the command that prints it
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _call(main) or 0
    except UserError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank:
            time.sleep(RANK_0_GRACE)  # the launcher ends this process as soon as rank 0 has left
        print(f"error: {error}" if rank == 0 else f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
        status = EXIT_USER_ERROR
    except BrokenPipeError:
        # the reader of our standard output went away (`| head`): not an error of the user's, nor of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        say_interrupted()
        status = EXIT_INTERRUPTED
    sys.exit(status)


def _call(main: Callable[[], int | None]) -> int | None:
    """Call `main`, and make a UserError of the limit on open files, which any of the libraries may meet anywhere."""
    try:
        return main()
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        raise too_few() from None
