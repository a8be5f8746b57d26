"""Ctrl-C while a command still imports its libraries: one line, and the process is gone.

Scripts import `at_once` first, which installs the handler; this module leaves the signals of whoever imports it alone.
KeyboardInterrupt would not do here: it ends in a traceback through whatever was being imported, and libraries that try
optional imports swallow it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_INTERRUPTED = 130


def say_interrupted() -> None:
    """Print the line of an interrupted command; of the ranks of a job only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print("interrupted", file=sys.stderr, flush=True)


def _leave(number: int, frame: FrameType | None) -> None:
    say_interrupted()
    os._exit(EXIT_INTERRUPTED)


def leave_at_once() -> None:
    """Have Ctrl-C end the process without a clean-up: nothing has begun that would need one."""
    ours = threading.current_thread() is threading.main_thread()
    if ours and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def clean_up_first() -> None:
    """Have Ctrl-C raise KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def leaving_at_once() -> Iterator[None]:
    """`leave_at_once` for a block of imports."""
    leave_at_once()
    try:
        yield
    finally:
        clean_up_first()
