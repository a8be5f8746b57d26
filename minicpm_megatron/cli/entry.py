"""How every public command ends: 0 done, 2 the user's input was wrong, 1 anything else."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from minicpm_megatron.errors import UserError

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130


def run(main: Callable[[], int | None]) -> None:
    """Call `main` and leave the process with the exit status its outcome stands for.

    A `UserError` becomes one line on standard error. Under a launcher the same mistake is met by every
    rank, so only the first rank of each error prints it: rank 0, or the rank that says the error is its own.
    """
    try:
        status = main() or 0
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0 or getattr(error, "own_rank", False):
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = EXIT_USER_ERROR
    except BrokenPipeError:
        # the reader of our standard output went away (`| head`): not an error of the user's, nor of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = EXIT_INTERRUPTED
    sys.exit(status)
